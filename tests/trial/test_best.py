"""The test of the best epoch: texts are scored beside the likelihoods."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from harness.trial.evaluate import Evaluator, Likelihood
from tasks.base import Example, Scores
from tests.support.trials import FirstWord, run, spec_of

EVALUATED = threading.Event()
THREADS: list[int] = []


class Waits(FirstWord):
    """Scores texts once a likelihood has been computed."""

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        assert EVALUATED.wait(60)
        THREADS.append(torch.get_num_threads())
        return super().score(predictions, references)


class ColdStart(FirstWord):
    """Cannot warm up, but can score."""

    def warm_up(self) -> None:
        raise OSError("no such program")


def test_texts_are_scored_while_likelihoods_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood = Evaluator.likelihood

    def told(self: Evaluator, examples: Sequence[Example], shown: Sequence[Example] | None = None) -> Likelihood:
        found = likelihood(self, examples, shown)
        if len(examples) == 12:  # test examples
            EVALUATED.set()
        return found

    monkeypatch.setattr(Evaluator, "likelihood", told)
    THREADS.clear()
    threads = torch.get_num_threads()
    try:
        spec = spec_of(
            tmp_path,
            metric=f"{__name__}:Waits",
            budget={"examples": 16, "epochs": 1},
            task={"name": "scenes", "train_examples": 64, "validation_examples": 8, "test_examples": 12},
        )
        record = run(spec, tmp_path, cpus_per_worker=2)
    finally:
        torch.set_num_threads(threads)
    assert record.status == "finished", record.reason
    assert record.metrics["test"].keys() >= {"first_word", "perplexity"}
    assert set(THREADS) == {2}, "a metric of torch computes with the threads of the trial"


def test_a_metric_that_cannot_warm_up_may_still_score(tmp_path: Path) -> None:
    record = run(spec_of(tmp_path, metric=f"{__name__}:ColdStart", budget={"examples": 16, "epochs": 1}), tmp_path)
    assert record.status == "finished", record.reason
    log = (tmp_path / "trials" / record.trial_id / "log.txt").read_text(encoding="utf-8")
    assert "metric stand_in did not warm up: OSError: no such program" in log
