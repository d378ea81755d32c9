"""Builds a trial's model from its spec: backbone, encoders, projectors, adapters, and the batches it is fed."""
