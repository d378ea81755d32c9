"""BLEU, METEOR, ROUGE-L and CIDEr of captions, as COCO computes them (pycocoevalcap 1.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import ClassVar

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from tasks.base import Metric, Scores
from tasks.metrics.meteor_process import meteor
from tasks.metrics.ptb import tokenise


class CaptionMetrics(Metric):
    """COCO's caption metrics, equal to calling pycocoevalcap by hand; METEOR, BLEU and ROUGE-L in 0–1, CIDEr in 0–10.

    Where the library is silently wrong, this is not:

    - A prediction without words is legitimate: every metric scores it 0.
    - A reference without words (punctuation, emoji) is left out; the library would reward an empty prediction for it.
    - CIDEr weighs words by how few images use them, so it depends on the evaluated set and means nothing where all
      images have the same references, one image above all: ``cider`` is then absent, where the library says 0.

    Safe to call from several threads. References are tokenised once for every distinct set of them.
    """

    labels: ClassVar[Mapping[str, str]] = {
        "bleu_4": "BLEU-4",
        "meteor": "METEOR",
        "rouge_l": "ROUGE-L",
        "cider": "CIDEr",
    }

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        """Score predictions by example id; ``per_example`` is in the order of ``references``.

        Raises:
            ValueError: there are no examples, the ids of predictions and references differ, or an example has no
                reference with a word in it.
            RuntimeError: Java failed.
        """
        _check(predictions, references)
        tokenised = _tokenised_references(tuple(tuple(captions) for captions in references.values()))
        gts = {key: list(captions) for key, captions in zip(references, tokenised, strict=True)}
        if wordless := [key for key, captions in gts.items() if not captions]:
            raise ValueError(f"no word in any reference of {_names(wordless)}")
        answers = dict(zip(gts, tokenise([predictions[key] for key in gts]), strict=True))
        res = {key: [answer] for key, answer in answers.items()}

        columns: dict[str, tuple[float, Sequence[float]]] = {}  # metric → corpus score, score per example
        bleu, bleus = Bleu(4).compute_score(gts, res, verbose=0)
        for n in range(4):
            columns[f"bleu_{n + 1}"] = (bleu[n], bleus[n])
        columns["meteor"] = meteor(gts, answers)
        columns["rouge_l"] = Rouge().compute_score(gts, res)
        if len({frozenset(captions) for captions in gts.values()}) > 1:
            columns["cider"] = Cider().compute_score(gts, res)
        return Scores(
            corpus={name: float(corpus) for name, (corpus, _) in columns.items()},
            per_example={
                key: {name: float(values[i]) for name, (_, values) in columns.items()} for i, key in enumerate(gts)
            },
        )


@lru_cache(maxsize=4)  # a trial's validation and test set, and those of another task; 5,000 images are a few MB
def _tokenised_references(references: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """Tokenise the references of every example, without those that have no words."""
    tokenised = iter(tokenise([caption for captions in references for caption in captions]))
    return tuple(tuple(filter(None, islice(tokenised, len(captions)))) for captions in references)


def _check(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not references and not predictions:
        raise ValueError("no examples to score")
    if unanswered := references.keys() - predictions.keys():
        raise ValueError(f"no prediction for {_names(unanswered)}")
    if unknown := predictions.keys() - references.keys():
        raise ValueError(f"no references for the prediction of {_names(unknown)}")
    if bare := [key for key, captions in references.items() if not captions]:
        raise ValueError(f"no references for {_names(bare)}")
    if single := [key for key, captions in references.items() if isinstance(captions, str)]:
        raise ValueError(f"the references of {_names(single)} are one string; a sequence of strings is needed")


def _names(ids: Iterable[str]) -> str:
    """Name the first five ids and count the rest."""
    ordered = sorted(ids)
    rest = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(repr(key) for key in ordered[:5]) + rest
