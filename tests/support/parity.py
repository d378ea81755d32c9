"""Whether two attempts at a trial have ended alike: all that depends on its training, bit by bit."""

from __future__ import annotations

from pathlib import Path

from harness.core.record import TrialRecord
from harness.trial.checkpoint import BEST
from tests.support.trials import examples_of

RESULTS = {"status", "history", "metrics", "data", "parameters", "best_epoch", "answers", "warnings", "workers"}


def assert_same_result(one: TrialRecord, folder: Path, other: TrialRecord, other_folder: Path) -> None:
    """Compare two records of a trial, in their run folders, with the scores of the examples and the best weights."""
    assert one.trial_id == other.trial_id
    assert one.model_dump(include=RESULTS) == other.model_dump(include=RESULTS)
    assert examples_of(folder, one).equals(examples_of(other_folder, other))
    weights = [(run / "trials" / one.trial_id / BEST).read_bytes() for run in (folder, other_folder)]
    assert weights[0] == weights[1]
