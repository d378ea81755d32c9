"""Which unfinished trials a run tries."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.files import write_atomically
from harness.core.record import Plan, TrialRecord, write_record
from harness.core.search import Halving
from harness.sweep.choice import Choice, attempts, stopped_trying
from tests.support.runs import METHODS, fake_plan, fake_record

PLAN = fake_plan(seeds=(0, 1, 2), methods=METHODS[:1])
FIRST = PLAN.trials[0]
PAIRS: Any = [(SimpleNamespace(trial_id=trial.trial_id), trial) for trial in PLAN.trials]
REASON = "ValueError: no such word (scenes.py:3; log: log.txt)"


def failed(**changes: Any) -> TrialRecord:
    return fake_record(FIRST, 1, 0.5).model_copy(update={"status": "failed", "reason": REASON, **changes})


def seeds_of(choice: Choice, run: Path, plan: Plan = PLAN) -> list[int]:
    return [planned.seed for _, planned in choice.todo(PAIRS, plan, run)]


def write_failures(run: Path, *records: TrialRecord) -> None:
    """The last one as the record, the earlier ones as attempts."""
    for number, record in enumerate(records[:-1], 1):
        write_atomically(run / "trials" / FIRST.trial_id / f"attempt-{number}.json", record.model_dump_json())
    write_record(run, records[-1])


def test_a_run_tries_each_trial_once(tmp_path: Path) -> None:
    choice = Choice()
    assert seeds_of(choice, tmp_path) == [0, 1, 2]
    write_record(tmp_path, failed())
    assert seeds_of(choice, tmp_path) == []
    assert list(choice.lines(PAIRS, PLAN, tmp_path)) == []


def test_only_the_selected_trials_are_run(tmp_path: Path) -> None:
    choice = Choice("seed>0")
    assert seeds_of(choice, tmp_path) == [1, 2]
    assert list(choice.lines(PAIRS, PLAN, tmp_path)) == ["2 of 3 trials selected by --only 'seed>0'"]


@pytest.mark.parametrize(
    ("records", "retry", "seeds"),
    [
        ([failed()], "auto", [0, 1, 2]),
        ([failed()], "none", [1, 2]),
        ([failed(), failed()], "auto", [1, 2]),
        ([failed(), failed()], "failed", [0, 1, 2]),
        ([failed(), failed(reason=REASON.replace("scenes.py:3", "scenes.py:4"))], "auto", [1, 2]),  # the place differs
        ([failed(), failed(reason="KeyError: 'a' (log: log.txt)")], "auto", [0, 1, 2]),
        ([failed(), failed(status="out_of_memory")], "auto", [0, 1, 2]),
        ([failed(), failed(git_revision="2")], "auto", [0, 1, 2]),  # other code
        ([failed(), failed(versions={"torch": "3.0"})], "auto", [0, 1, 2]),
        ([failed(reason="other"), failed(), failed()], "auto", [1, 2]),
        ([failed(), failed(reason="other"), failed()], "auto", [0, 1, 2]),
        ([failed(), failed(status="pruned")], "none", [0, 1, 2]),  # by another halving
    ],
)
def test_what_fails_twice_in_the_same_way_is_left_alone(
    records: list[TrialRecord], retry: Any, seeds: list[int], tmp_path: Path
) -> None:
    write_failures(tmp_path, *records)
    lines = list(Choice(retry=retry).lines(PAIRS, PLAN, tmp_path))
    assert seeds_of(Choice(retry=retry), tmp_path) == seeds
    why = "failed before (--retry none)" if retry == "none" else "failed twice in the same way"
    expected = [f"1 trial {why} and is not tried again; --retry failed does it"]
    assert lines == (expected if len(seeds) == 2 else [])


def test_status_says_which_failures_the_next_run_leaves_alone(tmp_path: Path) -> None:
    write_failures(tmp_path, failed())
    assert stopped_trying(tmp_path, {FIRST.trial_id: failed()}) == ""
    write_failures(tmp_path, failed(), failed())
    says = "1 trial failed twice in the same way: harness run --retry failed tries it again"
    assert stopped_trying(tmp_path, {FIRST.trial_id: failed()}) == says


def test_attempts_are_in_order(tmp_path: Path) -> None:
    write_failures(tmp_path, *(failed(reason=str(number)) for number in range(1, 13)))
    assert [record.reason for record in attempts(tmp_path, FIRST.trial_id)] == [str(n) for n in range(1, 12)]


def test_a_row_whose_learning_rates_are_halved_is_selected_as_a_whole(tmp_path: Path) -> None:
    halving = Halving(rungs=(1,))
    plan = PLAN.model_copy(update={"trials": tuple(t.model_copy(update={"halving": halving}) for t in PLAN.trials)})
    assert seeds_of(Choice("method=none"), tmp_path, plan) == [0, 1, 2]
    with pytest.raises(UserError, match=re.escape("--only: 'seed>0' selects a part of none examples=1024 epochs=8")):
        Choice("seed>0").selected(plan)
