"""Profiling a run: what is measured and kept, and what happens where it fails. The measuring process is replaced."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import harness
from harness.core.errors import UserError
from harness.core.profile import Profile, read_profile
from harness.core.record import TrialRecord, read_run, write_record
from harness.experiment.sections import Resources
from harness.sweep import profile as profiling
from harness.sweep import run
from harness.sweep.profile import AGAIN, PARTIAL, measure_run
from harness.sweep.profile_plan import groups_of
from harness.trial.profile import Answer, Job, StageTimes
from tests.support.profiled import ADAPTERS, trained
from tests.support.runs import fake_record

SPEED = {"none": 0.7, "lora": 1.1, "full": 1.0, "llava": 1.3}
NAMES = ["none", "LoRA r=2 specific", "LoRA r=4 specific", "full fine-tuning"]


class Process:
    """Answers with made-up times: see SPEED. ``trouble`` is asked before every measurement of speed."""

    def __init__(self) -> None:
        self.asked: list[str] = []  # labels of the methods whose speed was measured
        self.trouble: Callable[[str], str | None] = lambda _: None  # → reason; "killed": the process dies
        self.device = "cpu x86_64"
        self.stopped = 0

    def __call__(self, _log: Path) -> Process:
        return self

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self) -> None:
        self.stopped += 1

    def ask(self, job: Job) -> Iterator[Answer]:
        for index in job.memory:
            yield Answer(index=index, peak_bytes=1000 * (index + 1), device=self.device)
        for index in (0, *job.speed) if 0 not in job.speed else job.speed:
            yield Answer(index=index, begun=True, device=self.device)
            adapter = job.specs[index].adapter
            reason = self.trouble(adapter.label)
            if reason == "killed":
                yield Answer(index=index, reason="its process was killed", device=self.device)
                return
            if reason:
                yield Answer(index=index, reason=reason, device=self.device)
                if index == 0:
                    return
            elif index in job.speed:
                self.asked.append(adapter.label)
                own, other = times(adapter.method), times(job.specs[0].adapter.method)
                yield Answer(index=index, stages=own, reference=other if index else (), device=self.device)


def times(method: str) -> tuple[StageTimes, ...]:
    step_s = (SPEED[method],) * 6
    return (StageTimes(share=1, step_s=step_s, step_j=None, examples_per_step=8, tokens_per_step=80),)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    found = Process()
    monkeypatch.setattr(profiling, "Worker", found)
    return found


def measure(folder: Path, fresh: bool = False) -> tuple[Profile, str]:
    shown = io.StringIO()
    return measure_run(folder, Resources(), Console(file=shown, width=200), fresh), shown.getvalue()


def ratios(profile: Profile) -> dict[str, float | None]:
    return {entry.name: entry.step_time_ratio and entry.step_time_ratio.median for entry in profile.entries}


def test_seeds_rates_and_amounts_of_data_do_not_multiply_entries(tmp_path: Path, process: Process) -> None:
    folder = trained(tmp_path, budget={"examples": [16, 32], "epochs": [1, 2]})
    profile, shown = measure(folder)
    assert ratios(profile) == dict(zip(NAMES, (0.7, 1.1, 1.1, 1.0), strict=True))
    assert [len(entry.trial_ids) for entry in profile.entries] == [16, 8, 8, 8]
    assert {entry.reference for entry in profile.entries} == {"full fine-tuning"}
    assert process.asked == ["none", "LoRA r=2", "LoRA r=4"]
    assert "profile: speed and memory of 4 methods, apart from training; about" in shown
    assert read_profile(folder) == profile
    assert not (folder / PARTIAL).exists()


def test_each_setting_has_its_own_reference(tmp_path: Path, process: Process) -> None:
    folder = trained(tmp_path, optimizer={"per_device_train_batch_size": [4, 8]})
    groups = groups_of(read_run(folder))
    assert [group.setting for group in groups] == ["per_device_train_batch_size=4", "per_device_train_batch_size=8"]
    profile, _ = measure(folder)
    full = [entry for entry in profile.entries if entry.is_reference]
    assert [entry.setting for entry in full] == [group.setting for group in groups]
    assert all(entry.reference_trial_ids in {one.trial_ids for one in full} for entry in profile.entries)


def test_all_specs_of_a_setting_share_data_and_seed(tmp_path: Path) -> None:
    """The batches of a round must be equal: a method is measured on the data of the reference."""
    (group,) = groups_of(read_run(trained(tmp_path, budget={"examples": [16, 32], "epochs": 2})))
    specs = [entry.measurable for entry in group.entries]
    assert len({spec.model_dump_json(include={"task", "backbone", "budget", "seed"}) for spec in specs}) == 1
    assert specs[0].optimizer.learning_rate == 1e-3  # the smaller of the two


def test_the_first_row_is_the_reference_where_there_is_none(tmp_path: Path, process: Process) -> None:
    profile, _ = measure(trained(tmp_path, adapters=ADAPTERS[:2]))
    assert {entry.reference for entry in profile.entries} == {"none"}
    assert ratios(profile)["LoRA r=2 specific"] == pytest.approx(1.1 / 0.7)


def test_a_setting_of_one_row_is_measured_alone(tmp_path: Path, process: Process) -> None:
    profile, _ = measure(trained(tmp_path, adapters=ADAPTERS[2:]))
    assert [(entry.name, entry.is_reference, entry.step_time_s is not None) for entry in profile.entries] == [
        ("full fine-tuning", True, True)
    ]


def test_only_what_is_missing_is_measured_when_a_grid_grows(tmp_path: Path, process: Process) -> None:
    measure(trained(tmp_path, adapters=[ADAPTERS[0], ADAPTERS[2]]))
    process.asked.clear()
    profile, _ = measure(trained(tmp_path, seeds=[0, 1, 2]))
    assert process.asked == ["LoRA r=2", "LoRA r=4"]
    assert ratios(profile) == dict(zip(NAMES, (0.7, 1.1, 1.1, 1.0), strict=True))
    assert [len(entry.trial_ids) for entry in profile.entries] == [6, 3, 3, 3]
    assert all(entry.peak_memory_bytes and entry.memory_ratio for entry in profile.entries)
    process.asked.clear()
    again, shown = measure(tmp_path / "grid")
    assert (again, process.asked, shown) == (profile, [], "")


def test_ctrl_c_keeps_the_old_file_and_what_was_measured(tmp_path: Path, process: Process) -> None:
    folder = trained(tmp_path)
    before, _ = measure(folder)

    def interrupted(label: str) -> None:
        if label == "LoRA r=2":
            raise KeyboardInterrupt("pressed while LoRA r=2 is measured")

    process.trouble = interrupted
    process.asked.clear()
    with pytest.raises(KeyboardInterrupt, match="pressed while LoRA"):
        measure(folder, fresh=True)
    assert read_profile(folder) == before
    assert process.asked == ["none"]
    process.trouble = lambda _: None
    process.asked.clear()
    profile, _ = measure(folder, fresh=True)
    assert process.asked == ["LoRA r=2", "LoRA r=4"]
    assert ratios(profile) == ratios(before)
    assert not (folder / AGAIN).exists()
    process.asked.clear()
    measure(folder, fresh=True)
    assert process.asked == ["none", "LoRA r=2", "LoRA r=4"]


def test_what_cannot_be_measured_is_an_entry_with_the_reason(tmp_path: Path, process: Process) -> None:
    process.trouble = lambda label: "out of memory: 3 GiB" if label == "none" else None
    profile, shown = measure(trained(tmp_path))
    assert [(entry.name, entry.reason) for entry in profile.entries if entry.reason] == [
        ("none", "out of memory: 3 GiB")
    ]
    assert "not profiled: none: out of memory: 3 GiB" in shown
    process.trouble = lambda _: None
    process.asked.clear()
    assert ratios(measure(tmp_path / "grid")[0])["none"] == 0.7  # it is tried again
    assert process.asked == ["none"]


def test_a_killed_process_loses_one_method(tmp_path: Path, process: Process) -> None:
    process.trouble = lambda label: "killed" if label == "none" else None
    profile, _ = measure(trained(tmp_path))
    assert ratios(profile) == dict(zip(NAMES, (None, 1.1, 1.1, 1.0), strict=True))
    assert profile.entries[0].reason == "its process was killed"


def test_another_row_takes_the_place_of_a_reference_that_fails(tmp_path: Path, process: Process) -> None:
    process.trouble = lambda label: "out of memory" if label.startswith("full") else None
    profile, _ = measure(trained(tmp_path))
    assert profile.entries[-1].reason == "out of memory"
    assert {entry.reference for entry in profile.entries} == {"none"}
    assert ratios(profile)["LoRA r=2 specific"] == pytest.approx(1.1 / 0.7)


def test_nothing_can_be_measured(tmp_path: Path, process: Process) -> None:
    process.trouble = lambda _: "RuntimeError: no"
    profile, _ = measure(trained(tmp_path))
    assert {entry.reason for entry in profile.entries} == {"RuntimeError: no"}


def test_a_method_that_did_not_train_is_not_measured(tmp_path: Path, process: Process) -> None:
    def failed(record: TrialRecord) -> TrialRecord | None:
        method = record.spec["adapter"]["method"]
        if method == "none":
            return record.model_copy(update={"status": "out_of_memory", "reason": "CUDA"})
        return None if method == "full" else record

    profile, _ = measure(trained(tmp_path, failed))
    assert {entry.name: entry.reason for entry in profile.entries} == {
        "none": "out of memory in training",
        "LoRA r=2 specific": None,
        "LoRA r=4 specific": None,
        "full fine-tuning": "not trained yet",
    }
    assert process.asked == ["LoRA r=4"]  # the first LoRA is the reference


def test_entries_of_another_device_are_measured_again(tmp_path: Path, process: Process) -> None:
    measure(trained(tmp_path, adapters=[ADAPTERS[0], ADAPTERS[2]]))
    process.asked.clear()
    process.device = "NVIDIA H200"
    profile, _ = measure(trained(tmp_path))
    assert process.asked == ["none", "LoRA r=2", "LoRA r=4"]
    assert {entry.device for entry in profile.entries} == {"NVIDIA H200"}


def test_stages_of_other_epochs_are_entries_of_their_own(tmp_path: Path, process: Process) -> None:
    adapters = [{"method": "llava", "learning_rate": 1e-3}, ADAPTERS[2]]
    profile, _ = measure(trained(tmp_path, adapters=adapters, budget={"examples": 32, "epochs": [2, 4]}))
    assert [(entry.name, len(entry.trial_ids)) for entry in profile.entries] == [
        ("LLaVA two-stage", 2),
        ("full fine-tuning", 4),
        ("LLaVA two-stage", 2),
    ]


def test_a_run_without_a_finished_trial_is_refused(tmp_path: Path, process: Process) -> None:
    folder = trained(tmp_path, lambda _: None)
    with pytest.raises(UserError, match=r"grid: no trial has finished, so there is nothing to profile"):
        harness.profile_run(folder)


def test_a_run_whose_models_are_gone_is_refused(tmp_path: Path, process: Process) -> None:
    def moved(record: TrialRecord) -> TrialRecord:
        backbone = {**record.spec["backbone"], "language_model": str(tmp_path / "gone")}
        return record.model_copy(update={"spec": {**record.spec, "backbone": backbone, "fingerprints": {}}})

    folder = trained(tmp_path, moved)
    with pytest.raises(UserError, match=r"gone"):
        harness.profile_run(folder, console=Console(quiet=True))
    assert process.asked == []


RunIt = Callable[..., tuple[harness.Results, str]]


@pytest.fixture
def run_it(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> RunIt:
    """``run_experiment`` where every trial finishes at once."""
    shutil.copy(mlflow_database, tmp_path)

    def finish_all(prepared: run.Prepared, *_: object) -> None:
        for spec, planned in prepared.unfinished():
            record = fake_record(planned, 1, 0.5).model_copy(update={"spec": spec.model_dump(mode="json")})
            write_record(prepared.folder, record)

    monkeypatch.setattr(run, "_run_unfinished", finish_all)

    def call(**options: Any) -> tuple[harness.Results, str]:
        shown = io.StringIO()
        task = {"name": "scenes", "train_examples": 8, "validation_examples": 4, "test_examples": 4}
        experiment = harness.Experiment(
            name="grid", task=task, adapters=ADAPTERS[2:], resources=options.pop("resources", {})
        )
        console = Console(file=shown, width=200)
        return harness.run_experiment(experiment, tmp_path, console=console, **options), shown.getvalue()

    return call


def test_a_run_is_profiled_at_its_end_unless_switched_off(run_it: RunIt, process: Process) -> None:
    for options in ({"measure": False}, {"resources": {"profile": False}}):
        results, _ = run_it(**options)
        assert results.run.profile is None
        assert len(results.profile) == 0
    results, shown = run_it()
    assert "profile: speed and memory of 1 method, apart from training; about" in shown
    assert list(results.profile["name"]) == ["full fine-tuning"]
    assert list(results.profile["examples_per_s"]) == [8.0]
    assert list(results.profile["energy_ratio"]) == [None]


def test_ctrl_c_while_a_run_is_profiled_keeps_the_run(tmp_path: Path, run_it: RunIt, process: Process) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    process.trouble = interrupted
    results, shown = run_it()
    assert results.complete
    assert results.report is not None
    assert f"profile interrupted: `harness profile {tmp_path / 'grid'}` continues it" in shown
    assert results.run.profile is None
