"""Which trials may be compared: those trained on the same examples in the same order for as many steps, and scored on
the same examples.
"""

from __future__ import annotations

from harness.record import Data, TrialRecord

# What must agree, and how a refusal is worded.
_REASONS = {
    "examples_fingerprint": "training examples differ",
    "order_fingerprint": "order of the examples differs",
    "evaluation_fingerprint": "evaluation examples differ",
    "steps": "number of optimizer steps differs",
    "started_from": "adapter groups trained before, on other data",
}


def mismatch(one: TrialRecord, other: TrialRecord) -> str | None:
    """Why two trials of one setting may not be compared, in words; None when they match."""
    if one.seed != other.seed:
        return f"seed differs ({one.seed}, {other.seed})"
    if one.data is None or other.data is None:
        return "what was trained on is not recorded"
    differing = [_word(field, one.data, other.data) for field in _REASONS if _differs(field, one.data, other.data)]
    return "; ".join(differing) or None


def _differs(field: str, one: Data, other: Data) -> bool:
    return bool(getattr(one, field) != getattr(other, field))


def _word(field: str, one: Data, other: Data) -> str:
    return f"{_REASONS[field]} ({one.steps}, {other.steps})" if field == "steps" else _REASONS[field]
