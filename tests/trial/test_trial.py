"""Trials in this process on a few drawn images: the record, matched budgets, resuming, best weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from harness.core.record import TrialRecord, read_record, record_path
from harness.experiment.plan import TrialSpec
from harness.model import build
from harness.trial import trial
from harness.trial.best import evaluate_best
from harness.trial.engine import Engine
from harness.trial.evaluate import Evaluator
from harness.trial.trial import Progress
from tasks.metrics.coco import spice
from tests.support.trials import BITFIT, FULL, OTHERS, Recorder, examples_of, finished_trial, run, spec_of

PERPLEXITIES = {"perplexity", "perplexity_one_reference", "perplexity_wrong_input"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialRecord, Path, Recorder, list[Progress]]:
    return finished_trial(tmp_path_factory.mktemp("finished"))


# ── What a trial leaves behind


@pytest.mark.quick
def test_the_record_is_complete_and_equals_the_one_on_disk(finished: Any) -> None:
    record, folder, tracker, _ = finished
    assert (record.status, record.reason, record.warnings) == ("finished", None, ())
    assert read_record(record_path(folder, record.trial_id)) == record == tracker.finished[0]
    assert [(e.epoch, e.step) for e in record.history] == [(1, 4), (2, 8), (3, 12)]
    assert record.data.examples == 32
    assert record.data.steps == 12
    assert set(record.metrics["validation"]) == {"perplexity", "perplexity_one_reference"}
    assert set(record.metrics["test"]) == {*PERPLEXITIES, "first_word"}
    best = min(record.history, key=lambda e: e.validation_perplexity)
    assert record.best_epoch == best.epoch
    assert record.metrics["validation"]["perplexity"] == pytest.approx(best.validation_perplexity, rel=1e-6)
    assert 1 < record.metrics["test"]["perplexity"] < record.history[0].validation_perplexity * 2
    assert {"build", "encode", "train", "validate", "test"} == set(record.phases_s)
    assert sum(record.phases_s.values()) <= record.wall_time_s
    assert record.throughput.measured_steps == 12 - 3
    assert record.throughput.tokens_per_s > record.throughput.examples_per_s * 17  # BOS and 16 image tokens at least
    assert record.mlflow_run_id == "run-1"
    assert record.spec["adapter"]["config"]["rank"] == 2
    assert record.versions["torch"] == torch.__version__
    files = {path.name for path in (folder / "trials" / record.trial_id).iterdir()}
    assert files == {"record.json", "examples.parquet", "log.txt", "best.safetensors"}


def test_parameters_and_memory_are_those_of_the_live_model(finished: Any) -> None:
    record, _, _, _ = finished
    counts, memory = record.parameters, record.memory
    assert counts == build.count_parameters(TrialSpec.model_validate_json(json.dumps(record.spec)))
    assert counts.trainable == counts.adapter + counts.projector
    assert counts.by_group == {"image": counts.adapter // 2, "text": counts.adapter // 2}
    assert memory.weights_bytes == 4 * (counts.total - counts.encoder)
    assert memory.gradients_bytes == 4 * counts.trainable
    assert 8 * counts.trainable <= memory.optimizer_bytes <= 8.1 * counts.trainable + 1000
    assert memory.activations_bytes > 8 * 17 * 96 * 4  # more than the embeddings of one batch


def test_the_tracker_gets_the_metrics_of_every_epoch_by_step(finished: Any) -> None:
    record, _, tracker, _ = finished
    expected = [(e.step, e.model_dump(exclude={"epoch", "step"})) for e in record.history]
    assert tracker.logged == expected


def test_progress_grows_and_names_the_phases(finished: Any) -> None:
    record, _, _, progress = finished
    fractions = [p.fraction for p in progress]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert {"build", "validate", "test"} <= {p.phase for p in progress}
    ends = [p for p in progress if p.phase == "validate" and p.train_loss is not None]
    assert [p.epoch for p in ends] == [1, 2, 3]
    assert [p.validation_perplexity for p in ends] == [e.validation_perplexity for e in record.history]


@pytest.mark.quick
def test_per_example_scores_add_up_to_the_corpus_metrics(finished: Any) -> None:
    record, folder, _, _ = finished
    table = examples_of(folder, record)
    for split in ("validation", "test"):
        rows = table[table["split"] == split]
        assert len(rows) == rows["example_id"].nunique() == 12
        perplexity = math.exp(rows["nll"].sum() / rows["tokens"].sum())
        assert perplexity == pytest.approx(record.metrics[split]["perplexity"], rel=1e-12)
    test = table[table["split"] == "test"]
    wrong = math.exp(test["nll_wrong_input"].sum() / test["tokens"].sum())
    assert wrong == pytest.approx(record.metrics["test"]["perplexity_wrong_input"], rel=1e-12)
    assert not np.allclose(test["nll_wrong_input"], test["nll"])
    assert test["first_word"].mean() == pytest.approx(record.metrics["test"]["first_word"])
    assert table[table["split"] == "validation"]["prediction"].isna().all()
    assert all(len(references) == 5 for references in test["references"])
    for ((context, kind, path),) in map(json.loads, test["inputs"]):
        assert (context, kind) == ("image", "file")
        assert Path(path).is_file()
    first = math.exp(test["nll_first"].sum() / test["tokens_first"].sum())
    assert first == pytest.approx(record.metrics["test"]["perplexity_one_reference"], rel=1e-12)
    assert (test["tokens_first"] < test["tokens"]).all()
    assert test["prediction"].str.len().gt(0).any()
    assert (table["cluster"] == table["example_id"]).all()  # every picture is another one
    (answers,) = record.answers.values()
    assert (answers.texts, answers.distinct) == (12, len({" ".join(text.split()) for text in test["prediction"]}))
    assert answers.majority == ""  # captions hardly repeat


@pytest.mark.slow
def test_the_real_metrics_and_real_progress_of_a_whole_trial(tmp_path: Path) -> None:
    """COCO's own metrics through Java. The fast test of the same is tests/e2e, whose trials pay for Java anyway."""
    spec = spec_of(tmp_path, FULL, metric="", budget={"examples": 64, "epochs": 2})
    record = run(spec, tmp_path)
    assert record.status == "finished", record.reason
    expected = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider", "cider_d"}
    assert set(record.metrics["test"]) - {"spice"} == PERPLEXITIES | expected
    missing = spice.missing()
    assert ("spice" in record.metrics["test"]) is (missing is None)
    assert [line for line in record.warnings if "SPICE" in line] == ([missing] if missing else [])
    assert record.metrics["test"]["bleu_1"] > 0
    assert expected <= set(examples_of(tmp_path, record).columns)
    assert record.history[1].train_loss < record.history[0].train_loss


# ── The same for every method, the same again


def test_a_trial_repeated_gives_the_same_numbers(finished: Any, tmp_path: Path) -> None:
    record, folder, _, _ = finished
    again = run(spec_of(tmp_path), tmp_path)
    assert again.trial_id == record.trial_id
    assert again.metrics == record.metrics
    assert again.history == record.history
    assert again.data == record.data
    pd.testing.assert_frame_equal(examples_of(tmp_path, again), examples_of(folder, record))


@pytest.mark.parametrize(
    "adapter",
    [pytest.param(a, id=a["method"], marks=[] if a in (FULL, BITFIT) else pytest.mark.slow) for a in (FULL, *OTHERS)],
)
def test_every_method_of_a_seed_sees_the_same_data(finished: Any, adapter: dict[str, Any], tmp_path: Path) -> None:
    record, _, _, _ = finished
    other = run(spec_of(tmp_path, adapter), tmp_path)
    assert other.status == "finished", other.reason
    assert other.data == record.data
    assert other.trial_id != record.trial_id
    assert other.metrics["test"]["perplexity"] != record.metrics["test"]["perplexity"]


def test_another_seed_trains_on_other_data_but_is_evaluated_on_the_same(finished: Any, tmp_path: Path) -> None:
    record, _, _, _ = finished
    other = run(spec_of(tmp_path, seeds=[1], budget={"examples": 32, "epochs": 1}), tmp_path)
    assert other.data.examples_fingerprint != record.data.examples_fingerprint
    assert other.data.order_fingerprint != record.data.order_fingerprint
    assert other.data.evaluation_fingerprint == record.data.evaluation_fingerprint


def test_optimizer_steps_are_counted_not_micro_batches(tmp_path: Path) -> None:
    """32 examples, batches of 8, two per step: 2 steps per epoch."""
    optimizer = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    progress: list[Progress] = []
    record = run(spec_of(tmp_path, optimizer=optimizer), tmp_path, progress.append)
    assert [e.step for e in record.history] == [2, 4, 6]
    assert record.data.steps == 6
    assert progress[-1].fraction == 1


# ZeRO-3 as a fast test: a trial of two stages, in test_stages.py, and LoRA's engine, in test_engine.py.
@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3)] + [2])
def test_the_zero_stage_does_not_change_the_result(finished: Any, stage: int, tmp_path: Path) -> None:
    """It is not part of the trial's id. Different summation order: 1e-3 relative after 12 steps."""
    record, _, _, _ = finished
    other = run(spec_of(tmp_path), tmp_path, zero_stage=stage)
    assert other.status == "finished", other.reason
    found, expected = ([e.validation_perplexity for e in r.history] for r in (other, record))
    assert found == pytest.approx(expected, rel=1e-3)
    assert other.metrics["test"]["perplexity"] == pytest.approx(record.metrics["test"]["perplexity"], rel=1e-3)
    assert other.memory.weights_bytes == record.memory.weights_bytes


# ── Rows that share their inputs


def counted(read: list[int]) -> Callable[[Any, Any], float]:
    """``Trial.step_on``, which notes the positions that are read."""
    step_on = trial.Trial.step_on

    def step(own: Any, batch: Any) -> float:
        read.append(batch.positions)
        return step_on(own, batch)

    return step


@pytest.mark.parametrize(("method", "shares"), [("lora", True), ("moka", False)])
@pytest.mark.e2e
def test_a_trial_on_rows_that_share_their_picture_is_one_on_rows_of_one_caption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, shares: bool
) -> None:
    """With the dropout of the projector, which each picture has once."""
    budget = {"examples": 16, "epochs": 2, "references": "grouped"}
    adapter = {"method": method, "grouping": "specific", "learning_rate": 3e-3}
    spec = spec_of(tmp_path, adapter, budget=budget, optimizer={"per_device_train_batch_size": 12})
    positions: dict[bool, int] = {}
    found: dict[bool, TrialRecord] = {}
    with caplog.at_level(logging.INFO):
        for shared in (True, False):
            read: list[int] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(trial.Trial, "step_on", counted(read))
                found[shared] = run(spec, tmp_path / str(shared), shared_prefix=shared)
            positions[shared] = sum(read)
    assert (positions[True] < 0.8 * positions[False]) is shares
    assert ("training items get rows of their own" in caplog.text) is not shares
    one, other = found[True], found[False]
    assert one.data == other.data
    assert one.trial_id == other.trial_id == spec.trial_id
    for epoch, expected in zip(one.history, other.history, strict=True):
        assert epoch.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
        assert epoch.validation_perplexity == pytest.approx(expected.validation_perplexity, rel=1e-5)
    assert one.metrics["test"]["perplexity"] == pytest.approx(other.metrics["test"]["perplexity"], rel=1e-5)


# ── The best epoch


class Spoiler:
    """Makes the model worse from its second epoch on: perturbs the trained weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps_before: int) -> None:
        self.calls = 0
        step = Engine.train_step

        def spoiled(engine: Engine, batch: Any) -> float:
            self.calls += 1
            loss = step(engine, batch)
            if self.calls > steps_before:
                with torch.no_grad():
                    for p in engine.model.parameters():
                        if p.requires_grad:
                            p.add_(torch.randn_like(p), alpha=0.5)
            return loss

        monkeypatch.setattr(Engine, "train_step", spoiled)


def test_the_best_epochs_weights_are_the_ones_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Spoiler(monkeypatch, steps_before=4)
    tested: list[float] = []

    def again(spec: TrialSpec, evaluator: Evaluator, splits: build.Splits, *rest: Any) -> Any:
        tested.append(evaluator.likelihood(splits.validation).perplexity)
        return evaluate_best(spec, evaluator, splits, *rest)

    monkeypatch.setattr(trial, "evaluate_best", again)
    record = run(spec_of(tmp_path, budget={"examples": 32, "epochs": 2}), tmp_path)
    first, second = (e.validation_perplexity for e in record.history)
    assert second > 1.05 * first
    assert record.best_epoch == 1
    assert tested == [first], "to the last bit: the validation of the best epoch is not repeated for the record"
    assert record.metrics["validation"]["perplexity"] == first
    weights = safetensors.torch.load_file(tmp_path / "trials" / record.trial_id / "best.safetensors")
    assert sum(x.numel() for x in weights.values()) == record.parameters.trainable


def test_a_resumed_trial_tests_the_best_weights_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best weights of an epoch that was lost in the crash do not belong to the restored history."""
    Spoiler(monkeypatch, steps_before=4)
    monkeypatch.setattr(trial, "REPORT_INTERVAL_S", 0.0)
    spec = spec_of(tmp_path, budget={"examples": 32, "epochs": 2})
    with pytest.raises(KeyboardInterrupt, match="killed in epoch 2"):
        run(spec, tmp_path, killed_in_epoch(2), checkpoint_interval_s=0.0)
    lost = tmp_path / "trials" / spec.trial_id / "best.safetensors"
    lost.unlink()  # it is another name of the checkpoint's, and is replaced, never changed
    lost.write_bytes(b"of the epoch that was lost")
    record = run(spec, tmp_path, checkpoint_interval_s=0.0)
    assert record.status == "finished", record.reason
    assert record.best_epoch == 1
    best = record.history[0].validation_perplexity
    assert record.metrics["validation"]["perplexity"] == pytest.approx(best, rel=1e-6)


def killed_in_epoch(number: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.phase == "train" and progress.epoch == number:
            raise KeyboardInterrupt(f"killed in epoch {number}")

    return report
