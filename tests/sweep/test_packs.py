"""Which trials share a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.experiment.load import Experiment
from harness.experiment.plan import describe, expand
from harness.experiment.sections import Resources
from harness.sweep.declared import metrics_of
from harness.sweep.members import Planned
from harness.sweep.packs import packs_of

RATES = {"method": "lora", "rank": 2, "learning_rate": [1e-3, 2e-3, 4e-3]}


def trials_of(folder: Path, *adapters: dict[str, Any], **sections: Any) -> list[Planned]:
    content = {"task": {"name": "scenes"}, "adapters": list(adapters), "budget": {"examples": 8}, "seeds": [0, 1]}
    sections["optimizer"] = {"learning_rate": 1e-3} | sections.get("optimizer", {})
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content | sections), encoding="utf-8")
    experiment = Experiment.from_yaml(path)
    specs = expand(experiment)
    return list(zip(specs, describe(experiment, specs, metrics_of(specs), "").trials, strict=True))


def packed(
    trials: list[Planned], gpus: float = 0.0, at_once: int = 2, alone: tuple[str, ...] = (), **resources: Any
) -> list[str]:
    """Each pack as the places of its trials: ``0 2 4``."""
    places = {planned.trial_id: str(number) for number, (_, planned) in enumerate(trials)}
    packs = packs_of(trials, Resources(**resources), gpus, at_once, alone=alone)
    assert sorted(planned.trial_id for pack in packs for _, planned in pack) == sorted(places)
    return [" ".join(places[planned.trial_id] for _, planned in pack) for pack in packs]


@pytest.mark.quick
def test_rates_ranks_and_methods_of_one_seed_share_a_process(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, RATES, {"method": "bitfit+ia3"}, {"method": "none"}, {"method": "dora", "rank": 3})
    assert packed(trials, pack=8) == ["0 2 4 6 8 10", "1 3 5 7 9 11"]
    assert packed(trials, pack=4) == ["0 2 4 6", "1 3 5 7", "8 10", "9 11"]
    assert packed(trials, pack=1) == packed(trials, pack="off") == [str(place) for place in range(12)]


@pytest.mark.quick
def test_groups_that_differ_and_stacked_groups_share_a_process_with_others(tmp_path: Path) -> None:
    per_context = {"groups": {"image": {"method": "lora", "rank": [2, 4]}, "text": {"method": "ia3"}}}
    stacked = {"method": "lora", "rank": 2, "grouping": "shared+specific"}
    with_prompt = {"groups": {"image": {"method": "soft_prompt"}, "text": {"method": "ia3"}}}
    trials = trials_of(tmp_path, RATES, per_context, stacked, with_prompt, seeds=[0])
    assert packed(trials, pack=8) == ["0 1 2 3 4 5", "6"]


@pytest.mark.parametrize("method", ["full", "llava", "soft_prompt", "mmca", "lora+soft_prompt"])
def test_a_method_that_changes_more_than_layers_trains_alone(tmp_path: Path, method: str) -> None:
    trials = trials_of(tmp_path, {"method": method}, RATES, seeds=[0], budget={"examples": 8, "epochs": 2})
    assert packed(trials, pack=8) == ["0", "1 2 3"]


@pytest.mark.parametrize(
    "resources",
    [{"workers": 2}, {"zero_stage": 2}, {"zero_stage": 1, "offload": "optimizer"}, {"gradient_checkpointing": True}],
)
def test_trials_of_several_workers_of_zero_or_with_checkpointing_train_alone(
    tmp_path: Path, resources: dict[str, Any]
) -> None:
    assert packed(trials_of(tmp_path, RATES, seeds=[0]), pack=8, **resources) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "sections",
    [
        {"budget": {"examples": [8, 16]}},
        {"optimizer": {"weight_decay": [0.0, 0.1]}},
        {"budget": {"examples": 8, "epochs": [1, 2]}},
        {"task": {"name": "scenes", "train_examples": [64, 128]}},
    ],
)
def test_trials_of_other_data_or_options_are_apart(tmp_path: Path, sections: dict[str, Any]) -> None:
    trials = trials_of(tmp_path, RATES, seeds=[0], **sections)
    assert sorted(map(len, (pack.split() for pack in packed(trials, pack=8)))) == [3, 3]


def test_gradients_are_not_accumulated_in_a_pack(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, RATES, seeds=[0], optimizer={"gradient_accumulation_steps": 2})
    assert packed(trials, pack=8) == ["0", "1", "2"]


def test_on_its_own_it_packs_on_gpus_and_uses_all_of_them(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, {**RATES, "rank": [2, 3, 4, 5]})  # 12 of each seed
    assert packed(trials) == [str(place) for place in range(24)], "a CPU gains nothing"
    assert [len(pack.split()) for pack in packed(trials, gpus=1.0, at_once=2)] == [8, 8, 4, 4]
    assert [len(pack.split()) for pack in packed(trials, gpus=0.5, at_once=8)] == [3] * 8
    assert [len(pack.split()) for pack in packed(trials, gpus=1.0, at_once=24)] == [1] * 24


def test_a_trial_that_has_failed_trains_alone(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, RATES, seeds=[0])
    assert packed(trials, pack=8, alone=(trials[1][1].trial_id,)) == ["0 2", "1"]


def test_trials_that_pause_at_other_epochs_are_apart(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, RATES, {"method": "none"}, seeds=[0], budget={"examples": 8, "epochs": 4})
    searched = {planned.trial_id for _, planned in trials[:3]}
    packs = packs_of(trials, Resources(pack=8), 0.0, 1, lambda trial_id: (2,) if trial_id in searched else ())
    assert [len(pack) for pack in packs] == [3, 1]
