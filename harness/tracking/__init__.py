"""Logs grids and trials to MLflow, and fetches them back. The only package that imports mlflow."""
