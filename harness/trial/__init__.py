"""One trial: train, validate, test, measure. The only place that imports DeepSpeed."""
