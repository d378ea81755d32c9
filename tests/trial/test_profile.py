"""Measured steps are a trial's own; memory is that of the method; energy counters are read right."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.core.profile import measured
from harness.experiment.sections import Resources
from harness.trial import profile
from harness.trial.energy import Rapl
from harness.trial.profile import Answer, Job, Lane, interleave
from harness.trial.steps import take_each
from harness.trial.trial import Trial
from tests.support.trials import FULL, LORA, Recorder, spec_of

SMALL = {"examples": 32, "epochs": 2}


def weights(trial: Trial) -> dict[str, torch.Tensor]:
    model = trial.stages.built.model
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.e2e
def test_a_lane_takes_the_steps_of_its_trial_in_turn_with_another(tmp_path: Path) -> None:
    """After an epoch beside another model, the weights are exactly those of the trial's own loop."""
    spec, other = spec_of(tmp_path, LORA, budget=SMALL), spec_of(tmp_path, FULL, budget=SMALL)
    trial = Trial(spec, tmp_path, Resources(), Recorder(), lambda _: None)
    trial.build()
    trial._resume()
    take_each(trial._train_epoch(1), trial.take)
    expected = weights(trial)
    trial.stages.close()
    lane = Lane(spec, 0, Resources(), tmp_path)
    beside = Lane(other, 0, Resources(), tmp_path, lane.data)
    torch.manual_seed(spec.seed * 100_003 + 1)  # dropout, as in the epoch
    for step in range(4):
        state = torch.get_rng_state()
        beside.block(step, 1)
        torch.set_rng_state(state)
        lane.block(step, 1)
    found = weights(lane.trial)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    lane.close()
    beside.close()


@pytest.mark.slow
def test_a_slower_method_is_measured_as_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same method, with a delay in every step of one: the ratio is that of the delay."""
    monkeypatch.setattr(profile, "ROUNDS", 6)
    monkeypatch.setattr(profile, "BLOCK_S", 0.0)
    spec = spec_of(tmp_path, LORA, budget=SMALL)
    slow = spec.model_copy(update={"adapter": spec.adapter.model_copy(update={"label": "slow"})})
    step_on = Trial.step_on

    def delayed(self: Trial, batch: object) -> float:
        times = 4 if self.spec.adapter.label == "slow" else 1
        return [step_on(self, batch) for _ in range(times)][-1]  # type: ignore[arg-type]

    monkeypatch.setattr(Trial, "step_on", delayed)
    answers: list[Answer] = []
    interleave(Job(specs=(spec, slow, spec), resources=Resources(), speed=(1, 2)), answers.append)
    one, other = [answer for answer in answers if answer.stages]
    assert [len(one.stages[0].step_s), len(one.reference[0].step_s)] == [6, 6]
    ratios = [
        sorted(a / b for a, b in zip(x.stages[0].step_s, x.reference[0].step_s, strict=True)) for x in (one, other)
    ]
    assert ratios[0][2] > 2 > ratios[1][2]
    assert one.reference[0].examples_per_step == 8
    assert one.stages[0].step_j is None or one.stages[0].step_j[0] > 0


@pytest.mark.e2e
def test_rounds_end_early_where_they_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(tmp_path, LORA, budget=SMALL)
    for narrow, rounds in ((1e9, 8), (0.0, 15)):
        monkeypatch.setattr(profile, "NARROW", narrow)
        monkeypatch.setattr(profile, "BLOCK_S", 0.0)
        answers: list[Answer] = []
        interleave(Job(specs=(spec, spec), resources=Resources(), speed=(1,)), answers.append)
        (told,) = [answer for answer in answers if answer.stages]
        assert len(told.stages[0].step_s) == len(told.reference[0].step_s) == rounds


@pytest.mark.parametrize("rounds", range(9, 16))
def test_an_interval_that_may_end_early_is_still_of_95_per_cent(rounds: int) -> None:
    """Whatever is looked at to decide: the probabilities to miss, early and at the end, add up to less than 5 %."""

    def misses(n: int) -> float:
        low = measured(range(1, n + 1)).low
        assert low is not None
        return sum(2 * math.comb(n, below) / 2**n for below in range(int(low)))

    assert misses(profile.EARLY) + misses(rounds) <= 0.05


@pytest.mark.parametrize("spread", [0.005, 0.012, 0.02, 0.04])
def test_intervals_of_simulated_rounds_cover_the_ratio(spread: float) -> None:
    """Skewed noise, of which 5 % to nearly all of 4,000 measurements end early."""
    draws = 1.2 * np.exp(spread * np.random.default_rng(0).standard_t(3, size=(4000, 15)))
    early = [profile.is_narrow(row[: profile.EARLY].tolist()) for row in draws]
    intervals = [measured(row[: profile.EARLY if end else 15].tolist()) for row, end in zip(draws, early, strict=True)]
    covered = [one.low <= 1.2 <= one.high for one in intervals if one.low is not None and one.high is not None]
    assert len(covered) == len(draws)
    assert np.mean(covered) > 0.95
    assert 0 < np.mean(early) < 1


@pytest.mark.e2e
def test_a_method_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "ROUNDS", 6)
    spec = spec_of(tmp_path, LORA, budget=SMALL)
    broken = spec.model_copy(update={"adapter": spec.adapter.model_copy(update={"config": {"rank": -1}})})
    answers: list[Answer] = []
    interleave(Job(specs=(spec, broken, spec), resources=Resources(), speed=(1, 2)), answers.append)
    told = {answer.index: answer for answer in answers if not answer.begun}
    assert told[1].reason
    assert not told[1].stages
    assert told[2].stages


def test_counters_of_energy_wrap_around(tmp_path: Path) -> None:
    zones = [tmp_path / name for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1")]
    for zone in zones:
        zone.mkdir()
        (zone / "max_energy_range_uj").write_text("10000000", encoding="ascii")
        (zone / "energy_uj").write_text("9000000", encoding="ascii")
    meter = Rapl.find(tmp_path)
    assert meter is not None
    assert meter.joules() == 0
    (zones[0] / "energy_uj").write_text("500000", encoding="ascii")  # from 9 J over 10 J to 0.5 J
    (zones[1] / "energy_uj").write_text("9900000", encoding="ascii")  # a part of the first package: not counted twice
    (zones[2] / "energy_uj").write_text("9250000", encoding="ascii")
    assert meter.joules() == pytest.approx(1.5 + 0.25)
    assert meter.joules() == pytest.approx(1.75)


def test_a_machine_without_a_counter_has_no_energy(tmp_path: Path) -> None:
    assert Rapl.find(tmp_path) is None
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("", encoding="ascii")  # unreadable: only root may
    assert Rapl.find(tmp_path) is None
