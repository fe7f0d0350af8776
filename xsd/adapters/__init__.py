"""Room 4, drafter space to verifier space: one module a family of levels, one catalog."""
