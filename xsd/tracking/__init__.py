"""The only room that knows MLflow: runs, reuse, registry, queries, environment."""
