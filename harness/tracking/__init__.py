"""MLflow: grids and trials logged, and fetched back. The only place that imports mlflow."""
