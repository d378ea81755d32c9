"""What a run folder needs no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.record import read_run, write_record
from harness.sweep.prune import leftovers
from tests.support.cli import caller
from tests.support.runs import METHODS, fake_plan, fake_record, write_run

PLAN = fake_plan(seeds=(0, 1), methods=METHODS[:1])
FINISHED, FAILED = (trial.trial_id for trial in PLAN.trials)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished trial that has a checkpoint still, a failed one, and two of an older plan, one without a record."""
    folder = write_run(
        tmp_path / "run",
        PLAN,
        lambda trial, record: record.model_copy(update={"status": "failed"}) if trial.seed else record,
    )
    write_record(folder, fake_record(PLAN.trials[0].model_copy(update={"trial_id": "older"}), 1, 0.5))
    for trial_id in (FINISHED, FAILED, "begun"):
        (folder / "trials" / trial_id / "checkpoint").mkdir(parents=True)
        (folder / "trials" / trial_id / "checkpoint" / "state.json").write_text("x" * 2048)
    (folder / "trials" / "link").symlink_to(tmp_path)
    return folder


def test_only_what_nobody_needs_is_left_over(run: Path) -> None:
    found = {one.path.relative_to(run / "trials").as_posix(): (one.kept, one.why) for one in leftovers(read_run(run))}
    assert found == {
        "begun": (True, "an unfinished trial that the plan does not name"),
        "older": (True, "a record that the plan does not name"),
        f"{FINISHED}/checkpoint": (False, "the checkpoint of a finished trial"),
    }


def test_prune_lists_and_changes_nothing_until_it_is_told_to(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = caller(monkeypatch, capsys, "prune")
    before = sorted(run.rglob("*"))
    listed = harness(run)
    assert listed.code == 0
    assert f"move {run}/trials/older" in listed.out
    assert f"delete {run}/trials/{FINISHED}/checkpoint (2 KiB): the checkpoint of a finished trial" in listed.out
    assert f"nothing was changed; harness prune {run} --yes does it" in listed.out
    assert sorted(run.rglob("*")) == before

    record = (run / "trials" / "older" / "record.json").read_bytes()
    assert f"moved 2 to {run}/pruned, deleted 1" in harness(run, "--yes").out
    assert (run / "pruned" / "older" / "record.json").read_bytes() == record
    assert sorted(path.name for path in (run / "trials").iterdir()) == sorted([FINISHED, FAILED, "link"])
    assert not (run / "trials" / FINISHED / "checkpoint").exists()
    assert (run / "trials" / FAILED / "checkpoint" / "state.json").exists()
    assert read_run(run).foreign == ()
    assert "nothing to prune" in harness(run).out


def test_a_trial_that_was_pruned_before_is_kept_beside_the_new_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = caller(monkeypatch, capsys, "prune")
    (run / "pruned" / "older").mkdir(parents=True)
    assert harness(run, "--yes").code == 0
    assert (run / "pruned" / "older@2" / "record.json").exists()


def test_a_folder_without_a_plan_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = caller(monkeypatch, capsys, "prune")(tmp_path)
    assert outcome.code == 2
    assert str(tmp_path) in outcome.err
