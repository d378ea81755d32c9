"""Tests the best epoch of a trial: generates texts, and computes likelihoods while the texts are scored."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.core.record import Answers
from harness.experiment.plan import TrialSpec
from harness.model.build import Splits
from harness.trial.answers import answers_of
from harness.trial.evaluate import Evaluator, Likelihood, mismatched
from harness.trial.previews import write_previews
from harness.trial.scores import perplexities, score_members, write_examples
from tasks.base import Scores


@dataclass(frozen=True)
class Tested:
    """What the test of a trial gives; it is whole on rank 0 alone, which scores the texts.

    Attributes:
        metrics: split → metric → value.
        answers: of each task.
        notes: of the metrics on their scores.
    """

    metrics: dict[str, dict[str, float]]
    answers: dict[str, Answers]
    notes: tuple[str, ...] = ()


def evaluate_best(
    spec: TrialSpec, evaluator: Evaluator, splits: Splits, folder: Path, validated: Likelihood | None = None
) -> Tested:
    """Evaluate the model on validation and test examples, and write the scores of each example.

    Texts are generated first: while their metrics are computed, partly by Java, the model computes likelihoods.

    Args:
        spec: of the trial.
        evaluator: with the model of the best epoch.
        splits: its examples.
        folder: of the trial.
        validated: the likelihood of the validation examples by the same weights, if it is known.
    """
    predictions = evaluator.generate(splits.test)
    # A metric of torch computes with as many threads as here.
    with ThreadPoolExecutor(1, "scores", torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        scoring = pool.submit(_scored, spec, splits, predictions) if evaluator.workers.first else None
        validation = evaluator.likelihood(splits.validation) if validated is None else validated
        test = evaluator.likelihood(splits.test)
        others = mismatched(splits.test, seed=0)
        wrong = evaluator.likelihood(splits.test, others) if others else None
    if scoring is None:
        return Tested({}, {})
    scores, answers = scoring.result()
    features = evaluator.batches.features
    shown = write_previews(folder.parent.parent, splits.test, features, spec.task.modalities)
    write_examples(folder / "examples.parquet", splits, validation, test, wrong, predictions, scores, shown)
    wrong_input = {"perplexity_wrong_input": wrong.perplexity} if wrong else {}
    metrics = {
        "validation": perplexities(splits.validation, validation),
        "test": {**perplexities(splits.test, test), **wrong_input, **scores.corpus},
    }
    return Tested(metrics, answers, scores.notes)


def _scored(spec: TrialSpec, splits: Splits, predictions: Mapping[str, str]) -> tuple[Scores, dict[str, Answers]]:
    metrics = spec.task.metrics
    scores = score_members(metrics, splits.test, predictions)
    return scores, answers_of(metrics, splits.train, splits.test, predictions)
