"""A correct task and metric, and plugins that fail one check each, with the message they must cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import random
from typing import Any, ClassVar

import numpy as np
import torch

from harness.check import encoder as encoder_checks
from harness.check import metric as metric_checks
from harness.check import modality as modality_checks
from harness.check import task as task_checks
from harness.core.errors import UserError
from tasks.base import Config, Example, Metric, Part, Preview, Scores, Split, Task
from tasks.encoder import Encoder
from tasks.modalities.series import Series


class GoodConfig(Config):
    root: Path


class GoodTask(Task):
    contexts = ("series", "text")
    modalities: Mapping[str, str] = {"series": "series"}
    metrics = ("captions",)
    Config = GoodConfig
    config: GoodConfig

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        for split in ("train", "validation", "test"):
            for number in (1, 2):
                (folder / f"{split}{number}.csv").write_text(f"1\n2\n{number}\n", encoding="utf-8")
        return {"root": folder}

    def prepare(self) -> None:
        """Nothing to do."""

    def examples(self, split: Split) -> Sequence[Example]:
        return [self.example(f"{split}{number}") for number in (1, 2)]

    def example(self, name: str) -> Example:
        return Example(name, (Part("series", self.config.root / f"{name}.csv"),), (f"the series {name}",))


class GoodMetric(Metric):
    """Exact match."""

    labels: ClassVar[Mapping[str, str]] = {"exact": "Exact"}

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        if set(predictions) != set(references) or not all(references.values()):
            raise ValueError("ids differ, or there is no reference")
        return self.scores({key: float(predictions[key] in texts) for key, texts in references.items()})

    def scores(self, exact: dict[str, float]) -> Scores:
        mean = sum(exact.values()) / len(exact)
        return Scores({"exact": mean}, {key: {"exact": value} for key, value in exact.items()})


def make(base: type, **members: Any) -> type:
    """A plugin that differs from a correct one in a few members."""
    return type("Broken", (base,), {"__module__": __name__, **members})


def with_example(**fields: Any) -> type:
    """A task whose examples have these fields."""

    def example(self: GoodTask, name: str) -> Example:
        good = GoodTask.example(self, name)
        return Example(**{"id": name, "inputs": good.inputs, "references": good.references, **fields})

    return make(GoodTask, example=example)


class LaxConfig(GoodConfig):
    model_config: ClassVar = {"extra": "ignore"}


class ForgetfulConfig(GoodConfig):
    def model_dump_json(self, **options: Any) -> str:
        return '{"root": "elsewhere"}'


class Growing(GoodTask):
    asked = 0

    def examples(self, split: Split) -> Sequence[Example]:
        self.asked += 1
        return super().examples(split) * min(self.asked, 4)


class TwoOfThree(GoodTask):
    """Two examples with the same file say that they have nothing in common."""

    def examples(self, split: Split) -> Sequence[Example]:
        one, other = super().examples(split)
        again = replace(one, id=f"{split}3")
        return [replace(example, cluster=example.id) for example in (one, other, again)]


PNG_START = b"\x89PNG\r\n\x1a\n rest"


def preview_in_place(self: Series, item: Any) -> Preview:
    item[:] = 0
    return Preview.text("zeros")


def in_place(self: Task, context: str, item: Any, rng: np.random.Generator) -> Any:
    item += rng.normal()
    return item


SHARED = Path(__file__)
# Check → plugins that must fail it, each with a pattern of the message.
TASK_CASES: dict[Callable[..., Any], list[tuple[type, str]]] = {
    task_checks.clusters_hold_what_is_shared: [
        (with_example(cluster=7), r"train example 'train1': its cluster is 7; allowed: a non-empty string, or None"),
        (with_example(cluster=""), r"its cluster is ''"),
        (TwoOfThree, r"train1.csv is in two clusters, 'train1' \('train1'\) and 'train3' \('train3'\)"),
    ],
    task_checks.sample_gives_options: [
        (make(GoodTask, sample=classmethod(lambda cls, folder: {})), r"ValidationError: root: Field required"),
        (make(GoodTask, Config=dict), r"Config is <class 'dict'>; it must be a subclass of harness.TaskConfig"),
    ],
    task_checks.sample_can_be_read: [
        (make(GoodTask, example=lambda self, name: None), r"train contains a NoneType"),
        (
            make(GoodTask, prepare=lambda self: 1 / 0),
            r"^ZeroDivisionError: division by zero \(.*broken_plugins.py:\d+\)$",
        ),
    ],
    task_checks.contexts_are_distinct: [
        (make(GoodTask, contexts=("series", "series", "text")), r"'series' is listed twice"),
        (make(GoodTask, contexts=("text", "series")), r"the last context, 'series', is read from files"),
        (make(GoodTask, contexts=("serie", "text")), r"unknown context 'series'; allowed: .* did you mean 'serie'\?"),
        (make(GoodTask, contexts=()), r"contexts are \(\); required: one or more names"),
    ],
    task_checks.names_are_registered: [
        (make(GoodTask, modalities={"series": "serie"}), r"unknown modality 'serie'.*did you mean 'series'\?"),
        (make(GoodTask, metrics=("caption",)), r"unknown metric 'caption'.*did you mean 'captions'\?"),
        (make(GoodTask, metrics="captions"), r"metrics is a string, 'captions'; .* a tuple"),
    ],
    task_checks.options_are_strict: [(make(GoodTask, Config=LaxConfig), r"'no_such_option' was silently accepted")],
    task_checks.options_survive_json: [(make(GoodTask, Config=ForgetfulConfig), r"became .*elsewhere")],
    task_checks.it_is_repeatable: [(Growing, r"train is different on a second call")],
    task_checks.splits_are_not_empty: [(make(GoodTask, examples=lambda *_: []), r"no examples for validation")],
    task_checks.ids_are_unique: [
        (with_example(id="1"), r"id '1' is in train and again in validation"),
        (with_example(id=1), r"train has the id 1; allowed: a non-empty string"),
    ],
    task_checks.splits_share_no_file: [
        (with_example(inputs=(("series", SHARED),)), r"broken_plugins.py is in train .* and in validation")
    ],
    task_checks.inputs_are_of_their_context: [
        (with_example(inputs=(("serie", "a"),)), r"context 'serie'; .* did you mean 'series'"),
        (with_example(inputs=(("series", "a.csv"),)), r"'series' is 'a.csv'; series reads it, so it must be a Path"),
        (with_example(inputs=(("series", SHARED / "no"),)), r"train example 'train1': .*/no is not a file"),
        (with_example(inputs=(("text", SHARED),)), r"'text' is .*no modality reads it, so it must be a string"),
    ],
    task_checks.files_can_be_decoded: [(with_example(inputs=(("series", SHARED),)), r"UserError: .*broken_plugins.py")],
    task_checks.references_are_texts: [
        (with_example(references=()), r"references are \(\); required: one or more"),
        (with_example(references="one"), r"references are 'one'; required: one or more"),
        (with_example(references=("one", " ")), r"a reference is ' '; allowed"),
    ],
    task_checks.targets_are_known: [(with_example(target="series"), r"its target is 'series'; allowed: text")],
    task_checks.augment_is_reproducible: [
        (make(GoodTask, augment=in_place, augmented={"series"}), r"augment modified the series item in place"),
        (
            make(GoodTask, augment=lambda self, c, item, rng: item + np.random.normal(), augmented={"series"}),
            r"augment returned different items for one series and seed",
        ),
        (make(GoodTask, augment=lambda *_: "text", augmented={"series"}), r"turned a ndarray into a str"),
        (make(GoodTask, augment=lambda self, c, item, rng: item + rng.normal()), r"which `augmented` lacks"),
    ],
    task_checks.members_have_shares: [
        (with_example(member="other"), r"its member is 'other'"),
        (make(GoodTask, shares=lambda self, sizes: {"": 0.5}), r"are \{'': 0.5\}; .* sum of 1"),
    ],
}


class Features(Encoder):
    """An encoder whose features a test sets."""

    def __init__(self, make_features: Callable[[Any, int], Any], width: int = 2, weights: int = 0) -> None:
        super().__init__()
        self.make_features, self.width = make_features, width
        if weights:
            self.weight = torch.nn.Parameter(torch.zeros(weights))

    def encode(self, items: Sequence[Any]) -> list[Any]:
        return [self.make_features(item, len(items)) for item in items]


class GoodEncoder(Encoder):
    """Of series: each value and its square."""

    modality: ClassVar = "series"
    width = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2))

    def encode(self, items: Sequence[Any]) -> list[Any]:
        found = [torch.from_numpy(np.stack([item.ravel(), item.ravel() ** 2], axis=1)).float() for item in items]
        return [(x_ND.to(self.device) * self.scale).detach() for x_ND in found]


ENCODER_CASES: dict[Callable[..., Any], list[tuple[type, str]]] = {
    encoder_checks.modality_is_known: [
        (make(GoodEncoder, modality="serie"), r"serie.*did you mean .*series"),
        (make(GoodEncoder, modality=""), r"allowed|known|unknown"),
    ],
    encoder_checks.it_loads: [
        (make(GoodEncoder, make=classmethod(lambda cls, weights: cls())), r"make\(weights=True\) .* in training mode"),
        (make(GoodEncoder, make=classmethod(lambda cls, weights: cls().double().eval())), r"weights are torch.float64"),
        (make(GoodEncoder, make=classmethod(lambda cls, weights: None)), r"a NoneType; it must be a harness.Encoder"),
    ],
}


def encodes(make_features: Callable[[Any, int], Any], **members: Any) -> type:
    return make(Series, encoder=lambda *_: Features(make_features).eval(), **members)


def empty(**options: Any) -> Callable[..., Encoder]:
    return lambda *_: Features(lambda item, n: torch.zeros(1, 2), **options)


def load_lenient(self: Series, path: Path) -> Any:
    return np.zeros(3) if path.suffix == ".csv" else None


def load_coarse(self: Series, path: Path) -> Any:
    try:
        return Series().load(path)
    except UserError:
        raise UserError("cannot read it") from None


MODALITY_CASES: dict[Callable[..., Any], list[tuple[type, str]]] = {
    modality_checks.previews_can_be_shown: [
        (make(Series, preview=lambda self, item: 1 / 0), r"train1.csv: preview raised ZeroDivisionError"),
        (make(Series, preview=lambda self, item: "text"), r"preview returned a str; it must be a harness.Preview"),
        (make(Series, preview=lambda self, item: Preview("jpeg", b"1")), r"raised ValueError: .* kind 'jpeg'"),
        (make(Series, preview=lambda self, item: Preview("png", PNG_START)), r"cannot be opened as png: "),
        (make(Series, preview=lambda self, item: Preview("wav", b"RIFF\0\0\0\0WAVE")), r"cannot be opened as wav: "),
        (make(Series, preview=lambda self, item: Preview.text(f"{random()}")), r"different the second time"),
        (make(Series, preview=preview_in_place), r"preview modified the item in place"),
    ],
    modality_checks.files_are_read: [(make(Series, load=lambda *_: None), r"train1.csv: load returned None")],
    modality_checks.default_encoder_loads: [
        (make(Series, encoder=lambda *_: Features(lambda item, n: 0)), r"in training mode"),
        (make(Series, encoder=lambda *_: torch.nn.Linear(1, 1)), r"returned a Linear; it must be a harness.Encoder"),
        (make(Series, encoder=lambda *_: Features(max, weights=1).double().eval()), r"weights are torch.float64"),
        (make(Series, default_encoder="builtin/other"), r"UserError: .*'builtin/other' is not an encoder of "),
    ],
    modality_checks.loading_is_repeatable: [
        (make(Series, load=lambda *_: np.random.normal(size=3)), r"gave different items"),
        (encodes(lambda item, n: torch.randn(1, 2)), r"encoding it twice gave different features"),
    ],
    modality_checks.broken_files_are_named: [
        (make(Series, load=load_lenient), r"a corrupt file was silently decoded"),
        (make(Series, load=load_coarse), r"about a missing file does not name it: cannot read it"),
        (
            make(Series, load=lambda self, path: np.array(path.read_text().split())),
            r"a missing file raised FileNotFoundError",
        ),
    ],
    modality_checks.features_have_their_shape: [
        (encodes(lambda item, n: torch.zeros(1, 3)), r"shape \(1, 3\); allowed: \(N, 2\) with N ≥ 1"),
        (encodes(lambda item, n: torch.full((1, 2), torch.nan)), r"not finite"),
        (encodes(lambda item, n: torch.zeros(1, 2).double()), r"features are torch.float64"),
        (encodes(lambda item, n: torch.zeros(1, 2, device="meta")), r"features are on meta, the encoder on cpu"),
        (make(Series, encoder=lambda *_: make(Features, encode=lambda *_: [])(max).eval()), r"2 items gave 0 features"),
    ],
    modality_checks.features_do_not_depend_on_the_batch: [
        (encodes(lambda item, n: torch.full((1, 2), float(n))), r"up to 1 different from those alone"),
        (encodes(lambda item, n: torch.zeros(n, 2)), r"\(1, 2\) alone, \(2, 2\) with others"),
    ],
    modality_checks.empty_encoder_agrees: [
        (make(Series, empty_encoder=empty(width=3)), r"the width is 3 without weights and 12 with them"),
        (make(Series, empty_encoder=empty(width=12, weights=5)), r"5 parameters without weights and 0 with"),
        (
            make(Series, empty_encoder=lambda *_: make(Features, check=lambda *_: "too long")(max, width=12)),
            r"train1.csv: the encoder rejects it: too long",
        ),
        (make(Series, empty_encoder=empty(width=12)), r"train1.csv: features of shape \(1, 2\) without weights, \("),
        (
            make(Series, empty_encoder=lambda *_: Features(lambda item, n: {}["processor"], width=12)),
            r"without weights, encode raised KeyError: 'processor'; costs cannot be predicted",
        ),
    ],
    modality_checks.unknown_encoders_are_refused: [
        (encodes(lambda item, n: 0), r"silently accepted 'builtin/no-such-encoder'"),
        (make(Series, encoder=lambda *_: {}["name"]), r"raised KeyError: 'name'; it must raise a UserError"),
    ],
}


def scores(corpus: float | None, rows: Callable[[dict[str, float]], Any] = lambda exact: {}) -> type:
    """A metric with this corpus score, and per-example scores made from the correct ones."""
    found = {} if corpus is None else {"exact": corpus}
    return make(GoodMetric, scores=lambda self, exact: Scores(found, rows(exact)))


def score_by_position(self: Any, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
    exact = [float(text in texts) for text, texts in zip(predictions.values(), references.values(), strict=True)]
    return Scores({"exact": sum(exact) / len(exact)}, {key: {"exact": exact[i]} for i, key in enumerate(references)})


def score_words(self: Any, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
    words = [text.split()[0] for text in predictions.values()]
    return Scores({"exact": float(len(words))})


def counted(kind: str, counts: Callable[[dict[str, float]], Any], name: str = "exact") -> type:
    """A metric with a formula in ``corpus``, and these counts."""

    def score(self: GoodMetric, exact: dict[str, float]) -> Scores:
        return replace(GoodMetric.scores(self, exact), counts=counts(exact))

    return make(GoodMetric, corpus={name: kind}, scores=score)


METRIC_CASES: dict[Callable[..., Any], list[tuple[type, str]]] = {
    metric_checks.perfect_is_scored: [
        (scores(None), r"the corpus has no scores"),
        (
            make(GoodMetric, score=lambda *_: 1 / 0),
            r"ZeroDivisionError: division by zero \(.*broken_plugins.py:\d+\)",
        ),
    ],
    metric_checks.labels_name_scores: [
        (make(GoodMetric, labels={}), r"labels are empty"),
        (make(GoodMetric, labels={"em": "EM"}), r"labels contain 'em'; the corpus has exact, and no note"),
        (make(GoodMetric, lower_is_better={"em"}), r"lower_is_better contains 'em'; the corpus has exact"),
    ],
    metric_checks.right_beats_wrong: [
        (make(GoodMetric, lower_is_better={"exact"}), r"exact is 1 for right and 0 for wrong .* lower is better"),
        (scores(0.5), r"exact is 0.5 for right and 0.5 for wrong predictions; higher is better"),
    ],
    metric_checks.examples_have_scores: [(scores(1.0, lambda exact: {"1": {"exact": 1.0}}), r"has the ids \['1'\]")],
    metric_checks.counts_give_the_score: [
        (counted("share", lambda exact: {}), r"unknown formula 'share' for exact; allowed: bleu, mean, meteor, ratio"),
        (counted("ratio", lambda exact: {}), r"exact: counts have no 'exact' for any example; ratio needs it"),
        (counted("ratio", lambda e: {k: {"exact": (v,)} for k, v in e.items()}), r"1 numbers .*; ratio needs 2"),
        (
            counted("ratio", lambda e: {k: {"exact": (v, 2.0)} for k, v in e.items()}),
            r"exact is 1 for right predictions; ratio of the counts is 0.5",
        ),
        (counted("ratio", lambda exact: {}, "exactly"), r"corpus contains 'exactly'; the scores are exact"),
        (make(GoodMetric, corpus={"exact": "mean"}, scores=lambda *_: Scores({"exact": 1.0})), r"per_example has no"),
    ],
    metric_checks.scores_are_finite: [
        (scores(float("nan")), r"exact of the corpus is nan for right predictions"),
        (scores(1.0, lambda e: {key: {"exact": -np.inf} for key in e}), r"example '1' is -inf for empty predictions"),
    ],
    metric_checks.empty_is_a_score: [
        (make(GoodMetric, score=score_words), r"IndexError: list index out of range"),
        (scores(None), r"if all predictions are empty, the corpus has no score"),
    ],
    metric_checks.ids_must_match: [
        (scores_any := make(GoodMetric, score=lambda *_: Scores({"exact": 1.0})), r"unknown id: silently scored"),
        (scores_any, r"no references for '1': silently scored"),
        (make(GoodMetric, score=lambda self, p, r: [p[key] for key in r]), r"no prediction for '1': raised KeyError"),
    ],
    metric_checks.order_does_not_matter: [
        (make(GoodMetric, score=score_by_position), r"exact is 1.0, and 0.0 with the examples in reverse order")
    ],
}
