"""The journal of what MLflow may lack."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from harness.tracking import journal as module
from harness.tracking.journal import JOURNAL, Journal


def begun(folder: Path) -> Journal:
    journal = Journal(folder)
    journal.begin()
    return journal


def test_a_later_process_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    first = begun(tmp_path)
    assert not first.earlier
    first.add({"epoch/train_loss": 2.0, "epoch/validation_perplexity": math.inf}, 4)
    first.add({"epoch/train_loss": math.nan}, 8)
    second = begun(tmp_path)
    assert second.earlier
    assert second.began_ms == first.began_ms
    assert repr(second.points) == repr(first.points)
    second.add({"epoch/train_loss": math.nan, "epoch/validation_perplexity": 5.0}, 8)  # the first is known
    second.add({"epoch/train_loss": 2.5}, 4)  # another value: of another attempt
    keys = [(point.key, point.value, point.step) for point in Journal(tmp_path).points[3:]]
    assert keys == [("epoch/validation_perplexity", 5.0, 8), ("epoch/train_loss", 2.5, 4)]
    second.remove()
    assert not (tmp_path / JOURNAL).exists()


def test_a_line_that_was_cut_is_left_out_and_no_other(tmp_path: Path) -> None:
    begun(tmp_path).add({"a": 1.0}, 1)
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes() + b'{"at_ms": 3, "step": 2, "metr')
    again = begun(tmp_path)
    again.add({"a": 3.0}, 3)
    path.write_bytes(path.read_bytes() + b'[]\n{"at_ms": "x", "step": 2, "metrics": {"b": 1}}\n')
    assert [point.value for point in Journal(tmp_path).points] == [1.0, 3.0]


def test_it_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BYTES", 200)
    journal = begun(tmp_path)
    for step in range(10):
        journal.add({"system/cpu": float(step)}, step)
    journal.add({"epoch/train_loss": 1.0}, 9)
    assert len(journal.points) < 7
    assert journal.points[-1].key == "epoch/train_loss"
