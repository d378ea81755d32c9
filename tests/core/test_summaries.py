"""Summaries of records: what a run needs of each, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.record import record_path
from harness.core.summaries import read_summaries
from tests.support.runs import fake_plan, write_run

pytestmark = pytest.mark.quick


def test_the_summaries_of_a_run(tmp_path: Path) -> None:
    plan = fake_plan(seeds=(0, 1))
    failed = plan.trials[0].trial_id
    run = write_run(
        tmp_path,
        plan,
        lambda trial, record: (
            record.model_copy(update={"status": "failed", "reason": "no room"}) if trial.trial_id == failed else record
        ),
    )
    (run / "trials" / "begun").mkdir()  # a trial that has no record yet
    found = read_summaries(run)
    assert found.keys() == {trial.trial_id for trial in plan.trials}
    assert (found[failed].status, found[failed].reason) == ("failed", "no room")
    assert {one.status for trial_id, one in found.items() if trial_id != failed} == {"finished"}
    assert read_summaries(tmp_path / "nothing") == {}


@pytest.mark.parametrize("content", [b"", b'{"status": "finished"', b'{"status": "done", "wall_time_s": 1}', b"\xff"])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, content: bytes) -> None:
    plan = fake_plan(seeds=(0,))
    path = record_path(write_run(tmp_path, plan), plan.trials[2].trial_id)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.parent.name}/record.json: not a trial record"):
        read_summaries(tmp_path)


def test_a_dangling_link_is_no_record(tmp_path: Path) -> None:
    plan = fake_plan(seeds=(0,))
    path = record_path(write_run(tmp_path, plan), plan.trials[2].trial_id)
    path.unlink()
    path.symlink_to(tmp_path / "away")
    with pytest.raises(ValueError, match=r"record.json: not a trial record: a link to nothing"):
        read_summaries(tmp_path)
