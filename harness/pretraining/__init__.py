"""Pre-training of the built-in backbones."""
