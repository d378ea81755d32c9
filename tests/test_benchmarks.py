"""The adapters' benchmark compares like with like: all forms compute the same numbers. Times are not judged here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import adapters as report
from benchmarks import adapters_timing as timing
from benchmarks.adapters_cases import FROZEN, Bench, Case, Key, Size

TINY = Size(width=64, feed_forward=96, heads=4, layers=2, rows=3, length=32)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(TINY, torch.device("cpu"))


def short(name: str) -> str:
    """The same name in our adapters and in peft's model."""
    name = name.removeprefix("layers.").replace("/", ".").replace(".changes.lora.deltas.group_context_0", "")
    return name.replace(".default.weight", "")


def numbers(bench: Bench, case: Case, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients with these weights."""
    with torch.no_grad():
        for name, p in case.parameters().items():
            p.copy_(weights[short(name)])
    found = {"loss": bench.step(case), "input": bench.embeds_BTD.grad}
    found |= {short(name): p.grad for name, p in case.parameters().items()}
    bench.clear(case)
    return {name: x for name, x in found.items() if x is not None}


def weights_of(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    parameters = case.parameters().items()
    return {short(name): 0.2 * torch.randn(p.shape, generator=generator) for name, p in parameters}


@pytest.mark.parametrize(
    ("forms", "contexts"), [(("ours", "peft"), 1), (("ours", "mask", "one-hot"), 2), (("ours", "mask", "one-hot"), 4)]
)
@pytest.mark.parametrize("rank", [2, 16])
def test_all_forms_compute_the_same_numbers(bench: Bench, forms: tuple[str, ...], contexts: int, rank: int) -> None:
    """fp32 through two layers; 1e-4 of each tensor's largest number. At rank 16 and 4 contexts, ours uses no mask."""
    cases = [bench.case(Key(form, rank, contexts)) for form in forms]
    weights = weights_of(cases[0])
    expected, *others = (numbers(bench, case, weights) for case in cases)
    assert len(expected) == 2 + 2 * 7 * TINY.layers * contexts
    assert all(x.any() for x in expected.values())
    for found in others:
        assert set(found) == set(expected)
        for name, x in found.items():
            assert (x - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def test_a_case_leaves_the_model_as_it_found_it(bench: Bench) -> None:
    before = bench.forward(bench.model)
    for key in timing.whole_model_keys([2]):
        case = bench.case(key)
        bench.step(case)
        bench.clear(case)
    assert torch.equal(bench.forward(bench.model), before)
    assert bench.embeds_BTD.grad is None


@pytest.mark.e2e
def test_quick_measures_every_row_and_reports_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "Size", lambda **_: TINY)
    path = tmp_path / "out.json"
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        sys, "argv", ["adapters.py", "--quick", "--json", str(path), "--device", "cpu", "--threads", str(threads)]
    )
    report.main()
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    whole = {(row["form"], row["rank"], row["contexts"]): row for row in found["whole_model"]["rows"]}
    assert set(whole) == set(timing.whole_model_keys((8, 64)))
    curve = {(row["form"], row["rank"], row["contexts"]): row for row in found["curve"]["rows"]}
    assert set(curve) == set(timing.curve_keys((8, 64), (2, 8)))
    for row in (*whole.values(), *curve.values()):
        assert len(row["times_s"]) == 2
        assert row["peak_bytes"] >= row["saved_bytes"] > 0
        assert row["time_by_frozen"] > 0
    # What is kept does not depend on how many contexts there are, but for the comparator's mask.
    kept = {key: row["saved_bytes"] for key, row in curve.items()}
    assert kept["ours", 64, 8] == kept["ours", 64, 2] > kept["ours", 64, 1], "one group is folded into the weights"
    assert kept["mask", 64, 8] > kept["mask", 64, 2] > kept["ours", 64, 2]
    assert [row["form"] for row in found["limits"]] == ["BitFit", "IA3"]
    shown = capsys.readouterr().out
    assert "× ours agnostic" in shown
    assert "one-hot" in shown


def test_limits_are_those_of_the_shapes() -> None:
    """One layer, one token: BitFit changes q, k, v, o, down (width) and gate, up; IA3 k, v and down's input."""
    size = Size(width=10, feed_forward=100, layers=1, rows=1, length=1)
    assert timing.limit("BitFit", size) == timing.Limit(extra_bytes=3 * 250 * 4, extra_operations=2 * 250)
    assert timing.limit("IA3", size) == timing.Limit(extra_bytes=5 * 120 * 4, extra_operations=4 * 120)


def test_ratios_are_medians_of_ratios_within_a_round() -> None:
    results = {
        FROZEN: timing.Measured(1, 1, [1.0, 10.0, 2.0]),
        Key("ours", 8): timing.Measured(1, 1, [2.0, 11.0, 3.0]),
    }
    assert timing.ratio(results, Key("ours", 8), FROZEN) == 1.5
