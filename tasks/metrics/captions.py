"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE of captions, as COCO computes them (pycocoevalcap 1.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from numpy.typing import NDArray

from harness.core.record import Formula
from tasks.base import Metric, Scores
from tasks.metrics.alignment import check_aligned, name_ids
from tasks.metrics.coco import spice
from tasks.metrics.coco.bleu import bleu
from tasks.metrics.coco.cider import cider
from tasks.metrics.coco.meteor import files as meteor_files
from tasks.metrics.coco.meteor import meteor
from tasks.metrics.coco.meteor import start as start_meteor
from tasks.metrics.coco.ngrams import Ints
from tasks.metrics.coco.ptb import JAR, tokenise
from tasks.metrics.coco.references import References, prepare
from tasks.metrics.coco.rouge_l import rouge_l

# metric → corpus score, score per example
Columns: TypeAlias = dict[str, tuple[float, Sequence[float]]]
# key of Scores.counts → (I, K)
Counts: TypeAlias = dict[str, NDArray[Any]]


class CaptionMetrics(Metric):
    """COCO's caption metrics, equal to calling pycocoevalcap directly; all in 0–1, except CIDEr in 0–10.

    Differences where the library is silently wrong:

    - A prediction without words is legitimate: every metric scores it 0.
    - A reference without words (punctuation, emoji) is ignored; the library would reward an empty prediction for it.
    - CIDEr weighs words by how few images use them, so it depends on the evaluated set and is meaningless if all
      images have the same references (such as a single image): ``cider`` is then absent; the library returns 0.

    ``cider_d`` is the same number as ``cider``: see docs/metrics.md. ``spice`` is computed if its models are
    installed; otherwise a note says so. Safe to call from several threads; references are prepared once.

    Args:
        with_meteor: whether to compute METEOR, which needs a Java process of half a gigabyte.
    """

    labels: ClassVar[Mapping[str, str]] = {
        "cider": "CIDEr",
        "bleu_4": "BLEU-4",
        "meteor": "METEOR",
        "rouge_l": "ROUGE-L",
    }
    bounds: ClassVar[Mapping[str, tuple[float | None, float | None]]] = {
        **dict.fromkeys(("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "spice"), (0.0, 1.0)),
        **dict.fromkeys(("cider", "cider_d"), (0.0, None)),
    }
    corpus: ClassVar[Mapping[str, Formula]] = {
        "bleu_1": "bleu",
        "bleu_2": "bleu",
        "bleu_3": "bleu",
        "bleu_4": "bleu",
        "meteor": "meteor",
    }

    @classmethod
    def files(cls) -> Sequence[Path]:
        """The jars of the tokenizer, METEOR and, where it can run, SPICE, and METEOR's paraphrases."""
        return (JAR, *meteor_files(), *spice.files())

    def __init__(self, with_meteor: bool = True) -> None:
        self.with_meteor = with_meteor

    def warm_up(self) -> None:
        """Start METEOR's Java process, unless it runs."""
        if self.with_meteor:
            start_meteor()

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        """Score predictions by example id; ``per_example`` is in the order of ``references``.

        Raises:
            ValueError: there are no examples, the ids of predictions and references differ, or an example has no
                reference with a word in it.
            RuntimeError: Java failed.
        """
        check_aligned(predictions, references)
        notes = []
        with ThreadPoolExecutor(1) as pool:  # Python counts while Java tokenises and aligns
            tokenised = pool.submit(tokenise, [predictions[key] for key in references])
            known = prepare(tuple(tuple(captions) for captions in references.values()))
            if wordless := [key for key, captions in zip(references, known.tokenised, strict=True) if not captions]:
                raise ValueError(f"no word in any reference of {name_ids(wordless)}")
            _ = known.ngrams
            answers = tokenised.result()
            overlaps = pool.submit(_overlaps, known, answers)
            columns: Columns = {}
            counts: Counts = {}
            if self.with_meteor:
                corpus, per_example, counts["meteor"] = meteor(known.tokenised, answers, known.normalised)
                columns["meteor"] = (corpus, per_example)
            others, counts["bleu"] = overlaps.result()
            columns |= others
        if known.all_alike:
            notes.append(
                "CIDEr was not computed: it weighs words by how few examples use them, and here all examples "
                f"({len(answers)}) have the same references"
            )
        if missing := spice.missing():
            notes.append(missing)
        else:
            columns["spice"] = spice.spice(known.tokenised, answers)
        return Scores(
            corpus={name: float(corpus) for name, (corpus, _) in columns.items()},
            per_example={
                key: {name: float(values[i]) for name, (_, values) in columns.items()}
                for i, key in enumerate(references)
            },
            notes=tuple(notes),
            counts={
                key: dict(zip(counts, rows, strict=True))
                for key, *rows in zip(references, *map(_tuples, counts.values()), strict=True)
            },
        )


def _tuples(counts: NDArray[Any]) -> list[tuple[float, ...]]:
    return [tuple(row) for row in counts.tolist()]


def _overlaps(known: References, answers: Sequence[str]) -> tuple[Columns, Ints]:
    """The metrics that compare words, which Python computes; and BLEU's counts."""
    columns: Columns = {}
    words, counts = known.ngrams.count(answers)
    corpus, per_example, of_bleu = bleu(known.ngrams, words, counts)
    for n, (score, scores) in enumerate(zip(corpus, per_example, strict=True), 1):
        columns[f"bleu_{n}"] = (score, scores)
    columns["rouge_l"] = rouge_l(known.tokenised, answers)
    if not known.all_alike:
        columns["cider"] = columns["cider_d"] = cider(known.ngrams, words, counts)
    return columns, of_bleu
