"""Which layer is adapted, and which adapter group each token uses."""
