"""Room 2, tensors to tokens and states: the model pairs, their caches and cached steps."""
