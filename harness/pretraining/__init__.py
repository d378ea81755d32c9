"""How the built-in backbones were trained."""
