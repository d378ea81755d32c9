"""Measured memory and throughput, against values that are known exactly."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.placement import roles
from adapters.placement.router import Router
from harness.core.contexts import resolve_grouping
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.model import backbones, parameters
from harness.model.build import assemble, count_parameters
from harness.model.components import make_modalities
from harness.trial import measure
from tests.support.paper_table import PAPER_LAYER, each_row

CPU = torch.device("cpu")
QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"
SPECS = [spec for spec in expand(Experiment.from_yaml(QUICKSTART)) if spec.seed == 0]


# ── Activations


def test_saved_for_backward_counts_each_activation_once_and_no_weights() -> None:
    """Input of the first layer 5 × 4, output of tanh 5 × 8, which is the second layer's input too: 4 bytes each."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with measure.saved_for_backward(model) as saved:
        model(torch.randn(5, 4)).sum().backward()
    assert saved == [4 * (5 * 4 + 5 * 8)]


def test_saved_for_backward_counts_nothing_where_nothing_is_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)
    with measure.saved_for_backward(model) as saved:
        model(torch.randn(5, 4))
    assert saved == [0]


def test_saved_for_backward_adds_up_over_layers_and_changes_no_gradient() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Sigmoid()) for _ in range(3)]), torch.randn(2, 6)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with measure.saved_for_backward(model) as saved:
        model(x).sum().backward()
    assert saved == [4 * 2 * 6 * 4]  # the input and three outputs
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True) if p.grad is not None)


# ── Peak memory


def resettable() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not resettable(), reason="this system cannot reset a process's memory high-water mark")
def test_peak_memory_includes_freed_memory_but_not_that_of_earlier_trials() -> None:
    first = measure.PeakMemory(CPU)
    block = np.ones(200_000_000, dtype=np.uint8)
    before, peak = first.before_bytes, first.peak_bytes()
    del block
    after = first.peak_bytes()
    assert before is not None
    assert peak is not None
    assert 195e6 < peak - before < 260e6
    assert after is not None
    assert abs(after - peak) < 1e6  # the highest point, not the present
    second = measure.PeakMemory(CPU)
    assert second.before_bytes is not None
    assert second.before_bytes < peak - 150e6


def test_without_a_reset_the_peak_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_CLEAR_REFERENCES", tmp_path / "no such folder" / "clear_refs")
    peak = measure.PeakMemory(CPU)
    assert peak.before_bytes is None
    assert peak.peak_bytes() is None


# ── Speed


def test_the_clock_excludes_warm_up_and_time_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    clock = measure.StepClock(CPU)
    warming = []
    for duration in (50.0, 40.0, 30.0, 2.0, 3.0):
        warming.append(clock.warming_up)
        with clock:
            now[0] += duration
        clock.count(examples=10, tokens=100)
        now[0] += 1000.0  # evaluation, checkpoints
    assert warming == [True, True, True, False, False]
    throughput = clock.throughput()
    assert throughput is not None
    assert (throughput.examples_per_s, throughput.tokens_per_s, throughput.measured_steps) == (4.0, 40.0, 2)


def test_a_clock_that_measured_no_step_has_no_throughput() -> None:
    clock = measure.StepClock(CPU)
    for _ in range(measure.WARMUP_STEPS):
        with clock:
            pass
        clock.count(1, 1)
    assert clock.throughput() is None


# ── Parameters


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.adapter.label} {s.adapter.grouping_name}".strip())
def test_parameters_counted_without_weights_are_those_of_the_live_model(spec: TrialSpec) -> None:
    language_model = backbones.load_language_model(spec.backbone)
    encoder = make_modalities(spec)["image"].encoder(spec.backbone.encoders["image"])
    model = assemble(spec, language_model.model, {"image": encoder.width})
    live = parameters.count_parameters(model, [encoder])
    assert count_parameters(spec) == live
    base = sum(p.numel() for p in language_model.model.parameters())
    assert live.language_model == base
    assert live.projector == encoder.width * 96 + 96
    assert live.encoder == sum(p.numel() for p in encoder.parameters())
    assert live.total == base + live.projector + live.adapter + live.encoder
    assert live.trainable == live.projector + (base if spec.adapter.method == "full" else live.adapter)
    assert sum(live.by_group.values()) == live.adapter
    assert (live.adapter == 0) is (spec.adapter.method in {"none", "full"})


def test_specific_has_as_many_parameters_for_each_of_two_groups() -> None:
    counts = {
        (s.adapter.method, s.adapter.grouping_name): count_parameters(s).adapter
        for s in SPECS
        if s.adapter.grouping_name
    }
    assert {method for method, _ in counts} == {"ia3", "bitfit", "lora"}
    for method in ("ia3", "bitfit", "lora"):
        assert counts[method, "specific"] == 2 * counts[method, "agnostic"] > 0


# ── The paper's Table 3


@cache
def model_of_table_3(device: str) -> nn.Module:
    """Twelve layers of the paper's shape."""
    with torch.device(device):
        model = nn.Module()
        model.layers = nn.ModuleList(
            nn.ModuleDict({role: nn.Linear(*shape, bias=False) for role, shape in PAPER_LAYER.items()})
            for _ in range(12)
        )
        model.config = SimpleNamespace(model_type="paper")  # type: ignore[assignment]
    return model


@each_row
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_table_3_on_a_model_of_that_shape(
    method: AdapterMethod, agnostic: int, specific: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(roles.FAMILIES, "paper", {f"layers.*.{role}": role for role in PAPER_LAYER})
    model = model_of_table_3(device)
    with torch.device(device):
        for grouping, expected in (("agnostic", agnostic), ("specific", specific)):
            router = Router(resolve_grouping(grouping, ("image", "text"))[0])
            adapters = Adapters(model, dict.fromkeys(router.groups, method), router, seed=0)
            assert sum(p.numel() for p in adapters.parameters()) == expected


# ── Provenance


def test_versions_contain_those_of_python_and_torch() -> None:
    versions = measure.versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == torch.__version__
    assert set(measure.PACKAGES) < set(versions)
