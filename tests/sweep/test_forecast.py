"""The forecast of a plan: shapes, what does not fit and what would, where times come from, and what is written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import harness
from clusters.profiles import Device, Price, Profile
from harness.cli.forecast import show_forecast
from harness.core import probed as probes
from harness.core.errors import UserError
from harness.core.forecast import GIB, read_forecast
from harness.core.probed import Probed
from harness.core.record import Memory
from harness.experiment.sections import Resources
from harness.model.components import make_task
from harness.price.shapes import fingerprint
from harness.sweep.forecast import forecast_of, keep_forecast
from harness.sweep.run import prepare
from harness.trial.measure import this_device
from tests.support.profiled import trained

SECTIONS: dict[str, Any] = {
    "name": "grid",
    "task": {"name": "scenes", "train_examples": 64, "validation_examples": 8, "test_examples": 8},
    "adapters": [
        {"method": "none", "learning_rate": [1e-2, 1e-3]},
        {"method": "lora", "rank": 2, "grouping": "specific", "learning_rate": 1e-2},
    ],
    "budget": {"examples": 32, "epochs": 2},
    "seeds": [0, 1],
    "optimizer": {"per_device_train_batch_size": 8},
}


def shown(found: harness.Forecast) -> str:
    text = io.StringIO()
    show_forecast(found, Console(file=text, width=100))
    return text.getvalue()


def test_seeds_and_learning_rates_are_one_shape_and_nothing_is_written(tmp_path: Path) -> None:
    found = harness.plan_run(harness.Experiment(**SECTIONS), tmp_path)
    assert [(one.name, len(one.trial_ids), one.reason) for one in found.shapes] == [
        ("none", 4, None),
        ("LoRA r=2 specific", 2, None),
    ]
    assert list(tmp_path.iterdir()) == []
    none, lora = found.shapes
    assert none.memory is not None
    assert lora.memory is not None
    assert lora.trainable is not None
    assert none.trainable is not None
    assert lora.trainable > none.trainable
    assert lora.memory.activations_bytes > none.memory.activations_bytes
    assert none.trial is not None
    assert none.trial.source == "arithmetic"
    assert found.totals.trials == 6
    assert found.totals.slot is not None
    text = shown(found)
    assert "6 trials to run" in text
    assert "slot-hours" in text
    assert "EUR" not in text


def test_a_second_plan_knows_what_was_probed(tmp_path: Path) -> None:
    prepared = prepare(harness.Experiment(**SECTIONS | {"name": "probed", "budget": {"examples": 40}}), tmp_path)
    memory = Memory(weights_bytes=1, gradients_bytes=1, optimizer_bytes=1, activations_bytes=1)
    measured = Probed(
        device=this_device(), step_s=(2.0, 3.0, 4.0), reference_s=0.5, text_s=1.0, file_s=0.1, build_s=1.0,
        memory=memory,
    )  # fmt: skip
    probes.keep(fingerprint(prepared.specs[0], Resources()), measured)
    none, lora = forecast_of(prepared, Profile(name="local", kind="local")).shapes
    assert none.step_s is not None
    assert (none.step_s.low_s, none.step_s.middle_s, none.step_s.high_s) == (2, 3, 4)
    assert none.trial is not None
    assert none.trial.source == "probe"
    assert none.trial.middle_s > 5 * 3  # its steps alone
    assert lora.trial is not None
    assert lora.trial.source == "arithmetic"


@pytest.mark.parametrize(("size_gib", "times"), [(None, 1), (0.0, 2)], ids=["cached", "not cached"])
def test_encoding_that_was_measured_counts_once_where_features_are_kept(
    size_gib: float | None, times: int, tmp_path: Path
) -> None:
    sections = SECTIONS | {"name": f"encoding{times}", "adapters": [{"method": "none", "learning_rate": 1e-2}]}
    prepared = prepare(harness.Experiment(**sections, resources={"feature_cache_gib": size_gib}), tmp_path)
    make_task(prepared.specs[0]).prepare()  # its pictures are files, which are counted
    memory = Memory(weights_bytes=1, gradients_bytes=1, optimizer_bytes=1, activations_bytes=1)
    slots = []
    for file_s in (0.0, 1000.0):
        measured = Probed(
            device=this_device(), step_s=(1.0,), reference_s=0.0, text_s=0.0, file_s=file_s, build_s=0.0, memory=memory
        )
        resources = prepared.experiment.resources
        probes.keep(fingerprint(prepared.specs[0], resources), measured)
        found = forecast_of(prepared, Profile(name="local", kind="local"))
        assert found.totals.slot is not None
        slots.append(found.totals.slot.middle_s)
    assert slots[1] - slots[0] == pytest.approx(times * 1000 * (32 + 8 + 8)), "of two trials"


@pytest.mark.e2e
def test_what_does_not_fit_and_what_would_make_it_fit(tmp_path: Path) -> None:
    prepared = prepare(harness.Experiment(**SECTIONS), tmp_path)
    whole = forecast_of(prepared, Profile(name="local", kind="local")).shapes[0].memory
    assert whole is not None
    small = Device(memory_gib=0.6 * whole.device_bytes / GIB, tflops=1)
    price = Price(per_hour=2, currency="EUR", per="cpu")
    found = forecast_of(prepared, Profile(name="local", kind="local", device=small, price=price))
    assert [one.fits for one in found.shapes] == [False, False]
    remedies = found.shapes[0].remedies
    assert any("per_device_train_batch_size: 4, gradient_accumulation_steps: 2" in one for one in remedies)
    assert any("workers: 2" in one for one in remedies)
    assert not any("offload: optimizer" in one for one in remedies)  # its state is small
    text = shown(found)
    assert "does not fit: none: needs" in text
    assert "  fits with optimizer: {per_device_train_batch_size: 4" in text
    assert "price: " in text
    assert " EUR (" in text


def test_finished_trials_of_this_device_say_how_long_others_take(tmp_path: Path) -> None:
    folder = trained(tmp_path, lambda record: record.model_copy(update={"device": this_device(), "wall_time_s": 40.0}))
    experiment = harness.Experiment.from_yaml(folder / "experiment.yaml")
    found = harness.plan_run(experiment, tmp_path)
    times = [one.trial for one in found.shapes]
    assert [time and (time.middle_s, time.source) for time in times] == [(40.0, "records")] * 4
    assert found.totals.trials == 0
    assert "no trials are left to run" in shown(found)
    assert "disk:" not in shown(found)


def test_a_run_keeps_what_was_predicted_before_it(tmp_path: Path) -> None:
    folder = trained(tmp_path, lambda record: record.model_copy(update={"device": this_device(), "wall_time_s": 9e9}))
    prepared = prepare(harness.Experiment.from_yaml(folder / "experiment.yaml"), tmp_path)
    local = Profile(name="local", kind="local")
    keep_forecast(prepared, local)
    kept = read_forecast(folder)
    assert kept is not None
    assert {one.trial.source for one in kept.shapes if one.trial} == {"arithmetic"}
    keep_forecast(prepared, local)
    assert read_forecast(folder) == kept
    page = harness.load_results(folder).run
    assert page.plan.experiment == "grid"


def test_a_probe_is_of_this_machine(tmp_path: Path) -> None:
    prepared = prepare(harness.Experiment(**SECTIONS), tmp_path)
    with pytest.raises(UserError, match=r"--probe: measures on this machine, and profile far \(kind ray\)"):
        forecast_of(prepared, Profile(name="far", kind="ray", address="10.0.0.1:6379"), probe=True)


def test_what_is_not_known_of_another_machine_is_said(tmp_path: Path) -> None:
    prepared = prepare(harness.Experiment(**SECTIONS), tmp_path)
    found = forecast_of(prepared, Profile(name="far", kind="ray", address="10.0.0.1:6379"))
    assert [one.fits for one in found.shapes] == [None, None]
    assert [one.trial for one in found.shapes] == [None, None]
    assert any("memory_gib" in note for note in found.notes)
    assert any("tflops" in note for note in found.notes)
    assert "how long together is not known" in shown(found)
