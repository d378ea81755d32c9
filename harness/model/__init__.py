"""A trial's spec → backbone, encoders, projectors, adapters and batches, put together as one model."""
