"""Summaries of records: what a run needs of each, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.record import PlannedTrial, TrialRecord, read_run, record_path
from harness.core.summaries import read_brief, read_summaries
from results.leaderboard.progress import progress_of
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
    assert found.broken == {}
    assert found.known.keys() == {trial.trial_id for trial in plan.trials}
    assert (found.known[failed].status, found.known[failed].reason) == ("failed", "no room")
    assert {one.status for trial_id, one in found.known.items() if trial_id != failed} == {"finished"}
    assert read_summaries(tmp_path / "nothing").known == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a trial record"),
        (b'{"status": "finished"', "not a trial record"),
        (b'{"trial_id": "a", "status": "done", "wall_time_s": 1}', "not a trial record: status"),
        (b'{"trial_id": "a", "status": "failed", "wall_time_s": 1}', "contains the record of another trial, a"),
        (None, "not a trial record"),
    ],
    ids=["empty", "torn", "another status", "another trial", "a link to nothing"],
)
def test_a_file_that_is_no_record_of_its_trial_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    plan = fake_plan(seeds=(0,))
    path = record_path(write_run(tmp_path, plan), plan.trials[2].trial_id)
    path.unlink()
    if content is None:
        path.symlink_to(tmp_path / "away")
    else:
        path.write_bytes(content)
    found = read_brief(tmp_path)
    assert len(found.broken) == 1
    assert found.broken[0].startswith(f"{path}: {says}")
    assert len(found.records) == len(plan.trials) - 1


def test_a_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    plan = fake_plan(seeds=(0,))
    folder = record_path(write_run(tmp_path / "run", plan), plan.trials[2].trial_id).parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert read_summaries(tmp_path / "run").broken == {folder.name: f"{folder}: a link, which is not followed"}


def test_the_progress_of_a_run_is_the_same_from_summaries_and_from_whole_records(tmp_path: Path) -> None:
    plan = fake_plan(seeds=(0, 1))
    statuses = dict(
        zip([trial.trial_id for trial in plan.trials], ["failed", "out_of_memory", "finished"], strict=False)
    )

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        status = statuses.get(trial.trial_id, "finished")
        return None if trial.seed == 1 and trial.method == "lora" else record.model_copy(update={"status": status})

    write_run(tmp_path, plan, change)
    brief, whole = (progress_of(run, active=False) for run in (read_brief(tmp_path), read_run(tmp_path)))
    assert (brief.finished, brief.failed, brief.running, brief.waiting) == (
        whole.finished, whole.failed, whole.running, whole.waiting,
    )  # fmt: skip
    assert (brief.mean_wall_time_s, brief.waiting) == (pytest.approx(whole.mean_wall_time_s), 2)
