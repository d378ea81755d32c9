"""The comparisons of ``make bench`` are fair: the comparator computes the same, and counts are right."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.comparators import trainer_peft
from benchmarks.speed import __main__ as command
from benchmarks.speed import grid, jobs, limits, measure, memory_process, real, scoring, steps, table
from harness.core import hub
from harness.experiment.plan import TrialSpec
from harness.model.components import make_task

SMALL = {"examples": 32, "epochs": 2}


def specs_of(folder: Path, trials: int = 6, **evaluation: int) -> list[TrialSpec]:
    content = jobs.grid(trials, {}, SMALL)
    content["eval"] |= {"validation_examples": 4, "test_examples": 4, "max_new_tokens": 4} | evaluation
    return list(jobs.planned(content, folder))


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrialSpec]:
    found = specs_of(tmp_path_factory.mktemp("specs"))
    return {f"{spec.adapter.method} {spec.adapter.grouping_name}": spec for spec in found}


def say(*_: Any) -> measure.Say:
    return measure.Say(Console(quiet=True), 1.0)


def test_the_grid_has_24_trials_and_its_parts_are_stated(tmp_path: Path) -> None:
    names = jobs.names(jobs.planned(jobs.grid(24), tmp_path))
    assert len(set(names)) == 24
    assert sum("LoRA" in name for name in names) == sum("IA3" in name for name in names) == 8
    for trials in (6, 12):
        assert set(jobs.names(jobs.planned(jobs.grid(trials), tmp_path))) < set(names)


@pytest.mark.parametrize("padding", [pytest.param("max_length", marks=pytest.mark.slow), "longest"])
@pytest.mark.parametrize("method", ["lora", "bitfit", "ia3"])
def test_the_comparator_is_the_same_model(
    specs: dict[str, TrialSpec], tmp_path: Path, padding: str, method: str
) -> None:
    """Loss of a batch with random adapters, fp32: ours of an agnostic adapter and theirs with the same weights."""
    spec = specs[f"{method} agnostic"]
    trial = steps.built_trial(spec, tmp_path)
    ours = trial.stages.built.model.eval()
    job = replace(jobs.Jobs().of(spec, "fixed", None), padding=padding)
    tokenizer = trainer_peft.AutoTokenizer.from_pretrained(job.language_model)
    encoder = trainer_peft.encoder_of(job.encoder)
    base = trainer_peft.AutoModelForCausalLM.from_pretrained(job.language_model, dtype=torch.float32)
    theirs = trainer_peft.Captioner(trainer_peft.adapted(base, job), encoder, job.dropout).eval()
    mine, other = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs))
    copy(mine, other)
    draws = trial.stages.built.order.epoch(1)[:16]
    collator = trainer_peft.Collator(tokenizer, encoder, job)
    dataset = trainer_peft.Captions(job.train, None)
    with torch.no_grad():
        nll_B, tokens_B = ours(trial.batch(draws))
        found = theirs(**collator([dataset[n] for n in range(16)]))
    assert int(found["tokens"].sum()) == int(tokens_B.sum())
    torch.testing.assert_close(found["nll"], nll_B, rtol=1e-4, atol=1e-4)
    assert found["loss"].item() == pytest.approx((nll_B.sum() / tokens_B.sum()).item(), rel=1e-5)


def copy(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Random values into ours, and the same into theirs, matched by the end of the layer's path and the tensor."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ours.values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        left = dict(ours)
        for name, p in theirs.items():
            key = next(key for key, value in left.items() if same(key, name) and value.numel() == p.numel())
            p.copy_(left.pop(key).view_as(p))
    assert not left


def same(ours: str, theirs: str) -> bool:
    if "projector" in theirs:
        return "projectors" in ours and ours.rpartition(".")[2] == theirs.rpartition(".")[2]
    number, *parts = theirs.partition(".layers.")[2].split(".")
    layer = next(part for part in parts if part.endswith("_proj"))
    kind = next(kind for kind in ("lora_A", "lora_B", "ia3_l", "bias") if kind in theirs)
    return f"layers/{number}/" in ours and f"/{layer}" in ours and ours.endswith(kind)


@pytest.mark.e2e
def test_the_comparator_trains_on_the_harness_s_rows_and_scores_them(
    specs: dict[str, TrialSpec], tmp_path: Path
) -> None:
    """Two arms, which differ in padding and cached features alone, have equal scores, and learn."""
    spec, made, found = specs["lora specific"], jobs.Jobs(), {}
    features = tmp_path / "features.pt"
    for arm in grid.ARMS:
        job = replace(made.of(spec, arm, features), metrics=[])
        assert (job.padding, job.features is None) == {"fixed": ("max_length", True), "trimmed": ("longest", False)}[
            arm
        ]
        if arm == "trimmed":
            trainer_peft.make_features(job, features)
        found[arm] = trainer_peft.run(job)
    one, other = found.values()
    assert job.rank == 2 * spec.adapter.config["rank"]
    assert len(job.train) == 64
    assert one.scores == pytest.approx(other.scores, rel=1e-4)
    assert len(one.validation_perplexities) == 2
    assert one.validation_perplexities[1] < one.validation_perplexities[0] < 300
    assert {"load", "train", "validate", "likelihoods", "generate", "metrics"} < set(one.seconds)


@pytest.mark.parametrize("method", ["lora specific", "ia3 agnostic"])
def test_the_bare_loop_takes_the_engine_s_steps(specs: dict[str, TrialSpec], tmp_path: Path, method: str) -> None:
    """To 1e-4 of weights that a step moves by up to 1e-2; Adam makes much of the rounding of small gradients."""
    weights = []
    for make in (steps.engine_step, steps._bare_step):
        trial = steps.built_trial(specs[method], tmp_path)
        step = make(trial)
        torch.manual_seed(0)  # dropout
        for number in range(2):
            step(number)
        weights.append([p.detach().clone() for p in trial.stages.built.model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=0.0, atol=1e-4) for a, b in zip(*weights, strict=True))


def test_cases_are_measured_in_turn() -> None:
    order: list[str] = []
    cases = {name: lambda _, name=name: order.append(name) for name in "ab"}
    found = steps.in_turn(cases, 2, warm_up=1)
    assert "".join(order) == "ab" + "ab" + "ba"
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}


def test_operations_are_counted_below_autograd() -> None:
    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5)
    counted = limits.count(lambda: torch.nn.functional.linear(x, weight).view(2, 21).sum().backward())
    assert counted.flops == 2 * (2 * 6 * 5 * 7)  # forward, and the gradient of the input
    products = [one for one in counted.calls if one[1]]
    assert [size for *_, size in products] == [4 * (30 + 35 + 42), 4 * (42 + 35 + 30)]
    assert not any("view" in name for name, *_ in counted.calls)
    assert counted.limit_s(flops_per_s=1.0, bytes_per_s=1e12) == pytest.approx(counted.flops, rel=1e-6)


def test_attention_on_a_cpu_is_counted() -> None:
    q = torch.randn(2, 3, 8, 4)
    counted = limits.count(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert counted.flops == 2 * 2 * (2 * 3) * 8 * 8 * 4


def test_shared_prefixes_are_timed_on_the_same_likelihoods(tmp_path: Path) -> None:
    found = scoring.measure(argparse.Namespace(examples=3, rounds=1), tmp_path, say())
    for one in found["encoders"].values():
        assert one["perplexity"]["shared"] == pytest.approx(one["perplexity"]["alone"], rel=1e-4)
        assert len(one["rounds"]) == scoring.REPEATS
    first, second = scoring.rows(found)
    assert "16 tokens" in first.what
    assert "64 picture tokens" in second.what


def test_memory_of_a_block_and_of_a_process_is_seen() -> None:
    with memory_process.Peak() as peak:
        held = bytearray(2**26)
        memory_process.threading.Event().wait(0.05)
        held[::4096] = b"x" * (2**26 // 4096)
        memory_process.threading.Event().wait(0.05)
    assert 2**26 <= peak.rss_bytes - peak.before_bytes < 2**27
    script = "import time; x = b'x' * 2**27; t = time.process_time()\nwhile time.process_time() < t + 0.4: pass"
    with subprocess.Popen([sys.executable, "-c", script]) as process, measure.Tree(process.pid, memory=True) as tree:
        process.wait()
    assert tree.peak_pss_bytes > 2**27
    assert tree.cpu_s > 0.1


def test_without_real_models_a_row_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("REAL_MODELS", "FLICKR_ROOT"):
        monkeypatch.delenv(name, raising=False)
    found = real.measure(argparse.Namespace(references=None, rounds=1), tmp_path, say())
    (row,) = real.rows(found)
    assert (row.met, row.ratio) == (None, "not measured: REAL_MODELS and FLICKR_ROOT not set")


@pytest.mark.slow
def test_real_models_are_compared_on_the_same_captions(
    specs: dict[str, TrialSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the built-in backbone and drawn pictures in the places of the real ones."""
    drawn = make_task(specs["lora agnostic"])
    drawn.prepare()
    (tmp_path / "data" / "annotations").mkdir(parents=True)
    for name, of_coco in (("train", "train2017"), ("validation", "val2017")):
        (tmp_path / "data" / of_coco).symlink_to(drawn.folder / name)
        annotations = drawn.folder / "annotations" / f"captions_{name}.json"
        (tmp_path / "data" / "annotations" / f"captions_{of_coco}.json").symlink_to(annotations)
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    (tmp_path / "models" / "smollm2" / "fp32").symlink_to(hub.resolve("builtin/tiny-llama"))
    monkeypatch.setenv("REAL_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("FLICKR_ROOT", str(tmp_path / "data"))
    monkeypatch.setattr(real, "REPEATS", 1)
    (tmp_path / "files").mkdir()
    found = real.measure(argparse.Namespace(references="all", rounds=1), tmp_path / "files", say())
    assert [set(one["rounds"][0]) for one in found["encoders"].values()] == [{"all", "peft", real.SAME_ROWS}] * 2
    short, same, long, _ = real.rows(found)
    assert "16 picture tokens" in short.what
    assert "the same rows; 16 picture tokens" in same.what
    assert "64 tokens" in long.what


def grid_results() -> dict[str, Any]:
    names = [f"{label}, seed {seed}" for label in ("IA3 agnostic", "IA3 specific") for seed in (0, 1)]

    def arm(wall_s: float, perplexity: float) -> dict[str, Any]:
        scores = {name: {"perplexity": perplexity * (1 + 0.1 * int(name[-1]))} for name in names}
        return {"wall_s": wall_s, "cpu_s": 1.0, "scores": scores, "phases_s": {"train": 2.0}}

    rounds = [
        {"ours": arm(ours, 4.0), "fixed": arm(fixed, 4.4), "trimmed": arm(trimmed, 4.4)}
        for ours, fixed, trimmed in ((10, 70, 20), (20, 100, 40), (10, 61, 26))
    ]
    where = {"date": "2026-01-01", "commit": "abc", "processor": "chip", "cores used": 2, "cores": 4,
             "memory GiB": 8.0, "python": "3.11", "torch": "2.13.0", "load before": 0.1}  # fmt: skip
    return {"grid": {"machine": where, "trials": names, "rounds": rounds}}


def test_ratios_are_medians_of_rounds_and_stand_between_the_markers(tmp_path: Path) -> None:
    results = grid_results()
    fixed, trimmed = grid.rows(results["grid"])
    assert (fixed.ratio, fixed.met) == ("6.10×", True)  # of 7, 5 and 6.1
    assert (trimmed.ratio, trimmed.met) == ("2.00×", False)
    path = tmp_path / "performance.md"
    path.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        table.write(path, table.markdown(results))
    written = path.read_text(encoding="utf-8")
    assert written.startswith(f"before\n{table.BEGIN}\n| measured |")
    assert written.endswith(f"\n{table.END}\nafter\n")
    assert "old" not in written
    assert "| **no** |" in written
    assert "| IA3 agnostic | 4.200 | 4.620 | 4.620 |" in written
    assert "differ by 9.5 % (median of 2 pairs" in written
    assert "2026-01-01, abc: chip, 2 of 4 cores" in written
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no line"):
        table.write(path, "text")


@pytest.mark.e2e
def test_a_part_adds_its_results_to_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "speed.json"
    for name in ("REAL_MODELS", "FLICKR_ROOT"):
        monkeypatch.delenv(name, raising=False)
    for part in ("real", "scoring"):
        examples = ["--examples", "2"] if part == "scoring" else []
        monkeypatch.setattr(sys, "argv", ["speed", part, "--json", str(path), *examples])
        monkeypatch.setattr(command, "use_cores", lambda: None)
        command.main()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert set(found) == {"real", "scoring"}
    assert found["real"]["machine"]["torch"] == torch.__version__
    assert set(command.PARTS) == set(table.ORDER)
