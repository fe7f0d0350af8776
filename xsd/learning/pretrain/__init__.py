"""Makes the tiny pair: two small multimodal models trained from scratch on synthetic scenes."""
