"""Data sets as they are stored on disk and on the hub."""
