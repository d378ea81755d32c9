"""Runs a trial: trains, validates, tests and measures. The only package that imports DeepSpeed."""
