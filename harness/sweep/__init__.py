"""Runs all trials of a plan with Ray Tune. The only package that imports Ray."""
