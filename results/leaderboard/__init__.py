"""Trial records → matched rows, ranked and compared."""
