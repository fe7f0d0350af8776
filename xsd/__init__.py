"""xsd: speculative decoding across modalities, tracked in MLflow."""

__version__ = "0.1.0"
