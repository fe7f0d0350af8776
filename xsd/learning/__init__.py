"""Room 5, fitting: losses, the training loop of adapters, the tiny pair's pretraining."""
