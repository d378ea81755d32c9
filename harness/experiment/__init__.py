"""Reads and checks experiments, and expands them into the plan of their trials."""
