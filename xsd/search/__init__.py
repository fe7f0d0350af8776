"""Hyperparameter search: the only importer of Optuna.

A search pulls epoch reports from an objective and prunes by ceasing to pull; it knows neither
MLflow nor the data. Processes and machines share one study through its storage alone.
"""
