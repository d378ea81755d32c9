"""Scores of resampled test examples, from sums of columns, against scoring the drawn examples from scratch."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.rouge.rouge import Rouge as CocoRouge

from harness.core.formulas import score
from harness.core.record import MetricInfo
from harness.core.registry import Plugin
from harness.model.build import Splits
from harness.sweep.declared import metrics_of
from harness.trial.evaluate import Likelihood
from harness.trial.scores import perplexities, score_members, write_examples
from results.statistics.example_scores import Examples, read_examples, read_many
from results.statistics.intervals import resample_weights
from tasks.base import Example, Metric, Scores
from tasks.metrics.captions import CaptionMetrics
from tasks.metrics.exact_match import ExactMatch
from tasks.metrics.rouge import Rouge
from tasks.metrics.vqa_accuracy import VQAAccuracy
from tests.support.trials import spec_of


def plugin(name: str, target: str) -> Plugin:
    return Plugin(name=name, distribution="tests", result_version=1, target=target)


MEMBERS = {
    "photos": {name: plugin(name, f"{__name__}:{name.title()}") for name in ("captions", "variety")},
    "speech": {"error_rate": plugin("error_rate", "tasks.metrics.error_rate:ErrorRate")},
}
BLEU = tuple(f"bleu_{n}" for n in range(1, 5))


class Captions(CaptionMetrics):
    """Without Java: the texts here need no tokenizer, and METEOR is tested where its process runs."""

    def __init__(self) -> None:
        super().__init__(with_meteor=False)


class Variety(Metric):
    """A score that is not a sum over examples, and the mean of something else under the same name."""

    labels = {"vocabulary": "Vocabulary"}  # noqa: RUF012

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        words = {word for text in predictions.values() for word in text.split()}
        rows = {key: {"vocabulary": float(len(set(text.split())))} for key, text in predictions.items()}
        return Scores({"vocabulary": float(len(words))}, rows)


def texts(rng: random.Random, count: int, shortest: int = 1) -> list[str]:
    return [" ".join(rng.choices("abcdefg", k=rng.randint(shortest, 9))) for _ in range(count)]


class Trial:
    """What a trial leaves, in memory: 14 photographs of several captions, 9 recordings of one sentence."""

    def __init__(self) -> None:
        rng = random.Random(0)
        order = [*["photos"] * 14, *["speech"] * 9]
        rng.shuffle(order)
        self.test = [
            Example(
                f"{member}/{number}",
                (),
                tuple(texts(rng, rng.randint(1, 4) if member == "photos" else 1)),
                member=member,
            )
            for number, member in enumerate(order)
        ]
        answers = [
            rng.choice(example.references) if rng.random() < 0.4 else texts(rng, 1, 0)[0] for example in self.test
        ]
        self.predictions = dict(zip((example.id for example in self.test), answers, strict=True))
        nll = np.array([rng.uniform(2, 40) for _ in self.test])
        tokens = np.array([rng.randint(2, 20) for _ in self.test])
        self.likelihood = Likelihood(nll, tokens, nll / 2, np.maximum(tokens // 2, 1))
        self.wrong = Likelihood(1.5 * nll, tokens, nll, tokens)
        self.scores = score_members(MEMBERS, self.test, self.predictions)
        self.corpus = {
            **perplexities(self.test, self.likelihood),
            "perplexity_wrong_input": self.wrong.perplexity,
            **self.scores.corpus,
        }
        kinds = {f"photos/{name}": "bleu" for name in BLEU} | {"speech/wer": "ratio", "speech/cer": "ratio"}
        self.metrics = {
            name: MetricInfo.model_validate(
                {"name": name, "label": name, "higher_is_better": True, "corpus": kinds.get(name, "mean")}
            )
            for name in self.corpus
        }

    def write(self, path: Path) -> Path:
        validation = [Example("validation", (), ("a",), member="photos")]
        one = Likelihood(*(np.ones(1) for _ in range(4)))
        splits = Splits([], validation, self.test)
        write_examples(path, splits, one, self.likelihood, self.wrong, self.predictions, self.scores)
        return path


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        for module in ("captions", "coco.references"):
            patch.setattr(f"tasks.metrics.{module}.tokenise", list)
        return Trial()


@pytest.fixture(scope="module")
def path(trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trial.write(tmp_path_factory.mktemp("trial") / "examples.parquet")


@pytest.fixture(scope="module")
def examples(trial: Trial, path: Path) -> Examples:
    return read_examples(path, trial.metrics, trial.corpus)


def test_every_score_but_those_that_are_no_sums_is_given_again(trial: Trial, examples: Examples) -> None:
    assert set(trial.corpus) - set(examples.columns) == {"photos/vocabulary"}
    assert set(examples.columns) >= {"perplexity_one_reference", "perplexity_wrong_input", "speech/perplexity"}
    assert examples.ids == tuple(sorted(trial.predictions))
    for name, columns_EK in examples.columns.items():
        again = score(trial.metrics[name], columns_EK.sum(axis=0))
        assert again == pytest.approx(trial.corpus[name], rel=1e-9), name


def from_scratch(trial: Trial, drawn: list[Example], weights: dict[str, int]) -> dict[str, float]:
    """Scores of the drawn examples, each as often as it was drawn, by the libraries and by definition."""
    photos, speech = ([e for e in drawn if e.member == member] for member in ("photos", "speech"))
    said = [trial.predictions[e.id] for e in speech]
    gts = {n: list(e.references) for n, e in enumerate(photos)}
    res = {n: [trial.predictions[e.id]] for n, e in enumerate(photos)}
    place = {e.id: n for n, e in enumerate(trial.test)}

    def perplexity(likelihood: Likelihood, chosen: list[Example]) -> float:
        rows = [place[e.id] for e in chosen]
        return math.exp(math.fsum(likelihood.nll[rows]) / likelihood.tokens[rows].sum())

    fixed = [
        (trial.scores.per_example[key]["photos/cider"], times)
        for key, times in weights.items()
        if key.startswith("photos/")
    ]
    return {
        **{f"photos/{name}": value for name, value in zip(BLEU, Bleu(4).compute_score(gts, res, 0)[0], strict=True)},
        "photos/rouge_l": CocoRouge().compute_score(gts, res)[0],
        "photos/cider": sum(value * times for value, times in fixed) / sum(times for _, times in fixed),
        "speech/wer": jiwer.wer([e.references[0] for e in speech], said),
        "speech/cer": jiwer.cer([e.references[0] for e in speech], said),
        "perplexity": perplexity(trial.likelihood, drawn),
        "perplexity_wrong_input": perplexity(trial.wrong, drawn),
        "photos/perplexity": perplexity(trial.likelihood, photos),
    }


def test_a_resample_by_weights_is_scoring_the_drawn_examples(trial: Trial, examples: Examples) -> None:
    by_id = {example.id: example for example in trial.test}
    weights_BE = resample_weights(len(examples.ids))[:40]
    resampled = {name: score(trial.metrics[name], weights_BE @ columns) for name, columns in examples.columns.items()}
    for b, weights_E in enumerate(weights_BE):
        weights = {key: int(times) for key, times in zip(examples.ids, weights_E, strict=True)}
        drawn = [by_id[key] for key, times in weights.items() for _ in range(times)]
        assert len(drawn) == len(trial.test)
        for name, expected in from_scratch(trial, drawn, weights).items():
            assert resampled[name][b] == pytest.approx(expected, rel=1e-9, abs=1e-12), (name, b)


def test_the_columns_of_the_file(trial: Trial, path: Path) -> None:
    table = pq.read_table(path)
    lists = {"photos/bleu.counts": 10, "speech/wer.counts": 2, "speech/cer.counts": 2}
    assert {name for name in table.column_names if name.endswith(".counts")} == set(lists)
    rows = table.to_pylist()
    for name, width in lists.items():
        assert table.schema.field(name).type == pa.list_(pa.float64())
        member = name.partition("/")[0]
        lengths = {row["example_id"]: len(row[name]) for row in rows if row[name] is not None}
        assert lengths == {example.id: width for example in trial.test if example.member == member}


def changed(path: Path, folder: Path, **columns: Any) -> Path:
    table = pq.read_table(path)
    for name, change in columns.items():
        values = change(table.column(name).to_pylist())
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, folder / "changed.parquet")
    return folder / "changed.parquet"


COUNTS = "photos/bleu.counts"


@pytest.mark.parametrize(
    ("column", "change", "lost"),
    [
        (COUNTS, lambda rows: [row and row[:9] for row in rows], {f"photos/{name}" for name in BLEU}),
        (COUNTS, lambda rows: [row and [*row[:-1], row[-1] + 4] for row in rows], {f"photos/{name}" for name in BLEU}),
        ("speech/wer.counts", lambda rows: [None] * len(rows), {"speech/wer"}),
        ("speech/cer.counts", lambda rows: [float(row is not None) for row in rows], {"speech/cer"}),
        ("photos/cider", lambda rows: [row and row * 1.00001 for row in rows], {"photos/cider"}),
        ("nll_wrong_input", lambda rows: [None] * len(rows), {"perplexity_wrong_input"}),
    ],
    ids=["too few counts", "other counts", "no counts", "no lists", "other scores", "not measured"],
)
def test_columns_that_do_not_give_the_recorded_score_are_not_resampled(
    trial: Trial, path: Path, examples: Examples, tmp_path: Path, column: str, change: Any, lost: set[str]
) -> None:
    found = read_examples(changed(path, tmp_path, **{column: change}), trial.metrics, trial.corpus)
    assert set(examples.columns) - set(found.columns) == lost


def test_a_score_that_was_not_recorded_is_not_read(trial: Trial, path: Path) -> None:
    found = read_examples(path, trial.metrics, {"perplexity": trial.corpus["perplexity"]})
    assert set(found.columns) == {"perplexity"}
    assert read_examples(path, trial.metrics, {}).columns == {}


def test_a_plan_says_how_each_metric_is_made_of_the_examples(tmp_path: Path) -> None:
    kinds = {info.name: info.corpus for info in metrics_of([spec_of(tmp_path, metric="")])}
    assert kinds == {
        **dict.fromkeys(("perplexity", "perplexity_wrong_input", "cider", "rouge_l"), "mean"),
        "bleu_4": "bleu",
        "meteor": "meteor",
    }


@pytest.mark.parametrize("metric", [ExactMatch, Rouge, VQAAccuracy])
def test_other_metrics_are_the_mean_of_their_examples(metric: type[Metric]) -> None:
    rng = random.Random(2)
    references = {str(n): texts(rng, rng.choice([1, 10])) for n in range(40)}
    predictions = {key: rng.choice([given[0], texts(rng, 1)[0]]) for key, given in references.items()}
    found = metric().score(predictions, references)
    for name in metric.labels:
        values = [row[name] for row in found.per_example.values()]
        assert len(values) == 40
        assert len(set(values)) > 1
        assert found.corpus[name] == pytest.approx(math.fsum(values) / 40, rel=1e-12)


def test_processes_read_what_one_reads_in_the_same_order(
    trial: Trial, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing.parquet"
    sources = [(path, trial.corpus), (missing, trial.corpus), (path, {"speech/wer": trial.corpus["speech/wer"]})]
    alone = list(read_many(sources, trial.metrics))
    monkeypatch.setattr("results.statistics.example_scores._WORTH_PROCESSES", 1)
    monkeypatch.setattr("results.statistics.example_scores._PART", 1)
    beside = list(read_many(sources, trial.metrics))
    for one, other in zip(alone, beside, strict=True):
        if isinstance(one, str):
            assert one == other
            assert "No such file" in one
        else:
            assert isinstance(other, Examples)
            assert one.ids == other.ids
            assert {name: values.tolist() for name, values in one.columns.items()} == {
                name: values.tolist() for name, values in other.columns.items()
            }
    assert [isinstance(one, str) for one in beside] == [False, True, False]
