"""Disk space of a trial in its run folder."""

from __future__ import annotations

from harness.price.duration import Amounts
from harness.price.trace import Traced

_FILES = 40_000  # bytes of a record, its log and MLflow's rows
_EXAMPLE = 400  # bytes of an evaluated example in Parquet: its texts and scores
_STATE = 12  # bytes of a trained parameter's optimizer state in a checkpoint, at most


def kept_bytes(traced: Traced, amounts: Amounts) -> int:
    """What a finished trial keeps: the trained weights of its best epoch, its scores, record and log."""
    return traced.trained_bytes + _FILES + _EXAMPLE * (amounts.validation + amounts.test)


def checkpoint_bytes(traced: Traced) -> int:
    """What a running trial has in addition: one checkpoint, and a new one before the old one goes."""
    return 2 * (2 * traced.trained_bytes + _STATE * traced.trained)
