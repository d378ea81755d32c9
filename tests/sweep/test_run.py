"""run_experiment: the run folder it takes, what it refuses, and its progress in a notebook."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file, save_file

import harness
from harness.core import hub
from harness.core.errors import SweepEndedError, UserError
from harness.core.record import PlannedTrial, write_record
from harness.experiment.plan import expand
from harness.sweep import live, run, tune
from harness.sweep.live import LiveTable
from harness.sweep.preflight import check_fingerprints
from tests.support.runs import fake_record

GRID: dict[str, Any] = {
    "name": "grid",
    "task": {"name": "scenes", "train_examples": 8, "validation_examples": 4, "test_examples": 4},
    "adapters": [{"method": "none", "learning_rate": [1e-2, 1e-3]}],
}
EXPERIMENT = harness.Experiment(**{**GRID, "adapters": [{"method": "none", "learning_rate": 1e-2}]})


@pytest.fixture(autouse=True)
def database(tmp_path: Path, mlflow_database: Path) -> None:
    shutil.copy(mlflow_database, tmp_path)


def test_a_run_folder_is_one_experiments_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(harness.UserError, match=r"grid: in use by another .* --fresh"):
        harness.run_experiment(EXPERIMENT, tmp_path, console=Console(file=io.StringIO()))
    assert not (folder / "plan.json").exists()


def test_wrong_paths_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(harness.UserError, match=r"nothing\.yaml: no such file"):
        harness.run_experiment(tmp_path / "nothing.yaml", tmp_path / "runs")
    (tmp_path / "file").touch()
    with pytest.raises(harness.UserError, match=r"file/grid: not writable: .* --output"):
        harness.run_experiment(EXPERIMENT, tmp_path / "file")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"resources": {"workers": 2}},
            r"resources\.workers: found 2, with a run folder at a URL; allowed: 1, or a run",
        ),
        (
            {"search": {"halving": {"rungs": [1]}}, "budget": {"epochs": 2}},
            r"search\.halving: found with a run folder at a URL; allowed: one on a",
        ),
    ],
)
def test_what_needs_a_shared_file_system_is_refused_at_a_url(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    experiment = harness.Experiment(**{**GRID, **sections})
    with pytest.raises(harness.UserError, match=message):
        harness.run_experiment(experiment, f"file://{tmp_path}/there")
    assert not (tmp_path / "there").exists()


def test_a_rung_within_a_gradient_accumulation_is_refused(tmp_path: Path) -> None:
    experiment = harness.Experiment(
        **GRID,
        budget={"examples": 8, "epochs": 4},
        optimizer={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
        search={"halving": {"rungs": [1, 2]}},
    )
    message = r"search\.halving\.rungs: epoch 1 ends after 1 batches, within a step of gradient_accumulation_steps=2"
    with pytest.raises(harness.UserError, match=message):
        harness.run_experiment(experiment, tmp_path)
    assert not (tmp_path / "grid/trials").exists()


def test_a_refused_experiment_leaves_no_fresh_run_folder(tmp_path: Path) -> None:
    """Otherwise the next run would continue in the empty folder, not in the one with results."""
    (tmp_path / "grid").mkdir()
    broken = harness.Experiment(
        name="grid",
        task={"name": "scenes", "train_examples": 8, "validation_examples": 4, "test_examples": 4},
        adapters=[{"method": "none", "learning_rate": 1e-2}],
        budget={"examples": 9},
    )
    with pytest.raises(harness.UserError, match=r"budget\.examples: .*9 examples"):
        harness.run_experiment(broken, tmp_path, fresh=True, console=Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["grid"]


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (KeyboardInterrupt(), "interrupted: finished trials are kept"),
        (SweepEndedError("Ray has died"), "Ray has died; finished trials are kept; run the same experiment again"),
    ],
)
def test_a_sweep_that_ends_early_keeps_what_there_is_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException, says: str
) -> None:
    def interrupted(*_: object) -> None:
        raise end

    monkeypatch.setattr(run, "_run_unfinished", interrupted)
    shown = io.StringIO()
    results = harness.run_experiment(EXPERIMENT, tmp_path, console=Console(file=shown))
    assert not results.complete
    assert says in shown.getvalue()
    assert results.report is not None
    assert results.report.is_file()
    assert (len(results.trials), results.folder) == (0, tmp_path / "grid")


def test_other_weights_at_the_same_path_are_other_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise their trials count as finished, and new seeds are averaged with the old ones into one row."""
    model = Path(shutil.copytree(hub.resolve("builtin/tiny-llama"), tmp_path / "model"))

    def finish_all(prepared: run.Prepared, *_: object) -> None:
        for spec, planned in prepared.unfinished():
            dump = spec.model_dump(mode="json")
            write_record(prepared.folder, fake_record(planned, 1, 0.5).model_copy(update={"spec": dump}))

    def experiment(seeds: list[int]) -> harness.Experiment:
        return harness.Experiment(
            name="grid",
            task={"name": "scenes", "train_examples": 8, "validation_examples": 4, "test_examples": 4},
            backbone={"language_model": str(model)},
            adapters=[{"method": "none", "learning_rate": 1e-2}],
            seeds=seeds,
        )

    monkeypatch.setattr(run, "_run_unfinished", finish_all)
    first = harness.run_experiment(experiment([0]), tmp_path, measure=False, console=Console(file=io.StringIO()))
    assert first.complete
    assert len(run.prepare(experiment([0, 1]), tmp_path).unfinished()) == 1
    weights = load_file(model / "model.safetensors")
    save_file({name: torch.randn_like(w) for name, w in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert len(run.prepare(experiment([0, 1]), tmp_path).unfinished()) == 2
    shown = io.StringIO()
    again = harness.run_experiment(experiment([0, 1]), tmp_path, measure=False, console=Console(file=shown))
    assert f"1 record belongs to a trial not in the plan: language_model weights changed ({model})" in shown.getvalue()
    assert [row.seeds for row in again.board.rows] == ["2/2"]
    assert len(again.trials) == 2


def test_only_selected_trials_run_and_a_repeated_failure_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[int]] = []

    def sweep(wanted: tune.Sweep, _display: object) -> None:
        ran.append([planned.seed for _, planned in wanted.trials])
        for spec, planned in wanted.trials:
            ended = fake_record(planned, 1, 0.5).model_copy(update={"spec": spec.model_dump(mode="json")})
            failure = {"status": "failed", "reason": "ValueError: no (log: log.txt)"} if planned.seed == 2 else {}
            write_record(wanted.run, ended.model_copy(update=failure))

    monkeypatch.setattr(tune, "sweep", sweep)
    experiment = harness.Experiment(
        name="grid",
        task={"name": "scenes", "train_examples": 8, "validation_examples": 4, "test_examples": 4},
        adapters=[{"method": "none", "learning_rate": 1e-2}],
        seeds=[0, 1, 2],
    )
    shown = io.StringIO()

    def run_it(**options: Any) -> bool:
        shown.truncate(0)
        console = Console(file=shown)
        return harness.run_experiment(experiment, tmp_path, measure=False, console=console, **options).complete

    with pytest.raises(UserError, match=r"--only: unknown name 'sed'; .*did you mean 'seed'"):
        run_it(only="sed=1")
    assert not (tmp_path / "grid").exists()
    assert run_it(only="seed=1")
    assert "1 of 3 trials selected by --only 'seed=1'" in shown.getvalue()
    assert not run_it()
    assert not run_it()
    assert not run_it()
    assert "1 trial failed twice in the same way and is not tried again; --retry failed does it" in shown.getvalue()
    assert "all 3 trials have already finished or failed (1); nothing to compute" in shown.getvalue()
    assert not run_it(retry="failed")
    assert not run_it(retry="none")
    assert run_it(only="seed<2")
    assert ran == [[1], [0, 2], [2], [2]]


def test_a_hub_id_whose_commit_is_unknown_is_refused_before_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_unreachable", [])
    experiment = harness.Experiment(
        task="scenes", backbone={"language_model": "facebook/opt-125m"}, adapters=[{"method": "full"}],
        optimizer={"learning_rate": 1e-3},
    )  # fmt: skip
    specs = expand(experiment)
    assert specs[0].fingerprints["language_model"] is None  # planning works without a network
    with pytest.raises(harness.UserError, match=r"backbone\.language_model: 'facebook/opt-125m': its commit"):
        check_fingerprints(specs, "backbone")


def trial(number: int) -> PlannedTrial:
    return PlannedTrial(trial_id=str(number), label="LoRA", method="lora", grouping="", setting="", seed=number)


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_has_a_live_table_where_it_can_draw_one(monkeypatch: pytest.MonkeyPatch, widgets: bool) -> None:
    """Rich draws into a cell by ipywidgets and only warns without them: then a line per trial is printed."""
    monkeypatch.setattr(live, "find_spec", lambda _: object() if widgets else None)
    monkeypatch.setenv("JUPYTER_COLUMNS", "100")
    started: list[str] = []
    monkeypatch.setattr(live.Live, "start", lambda self: started.append("start"))
    monkeypatch.setattr(live.Live, "stop", lambda self: started.append("stop"))
    with LiveTable(Console(force_jupyter=True), [trial(0)], 0) as table:
        table.started("0", "0")
    assert started == (["start", "stop"] if widgets else [])
