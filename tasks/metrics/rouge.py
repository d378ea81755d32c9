"""ROUGE-1, ROUGE-2 and ROUGE-L of Lin (2004), https://aclanthology.org/W04-1013, by the library ``rouge-score``."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import ClassVar

from tasks.base import Metric, Scores
from tasks.metrics.alignment import check_aligned, name_ids


class Rouge(Metric):
    """F-measures, 0–1, without stemming (the default of Hugging Face's ``evaluate``), each against its best reference.

    ``rougeL`` is over the whole text, precision and recall weighted equally; ``rouge_l`` of the captions metric is
    COCO's, where recall has more weight. For text in ASCII these are the library's own numbers. It knows only the
    letters a–z, so that a Greek answer would score 0 against itself: here a word is a run of letters and digits of any
    script (where words are not separated, as in Chinese, a whole phrase, which makes the scores coarse).
    """

    labels: ClassVar[Mapping[str, str]] = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    bounds: ClassVar[Mapping[str, tuple[float | None, float | None]]] = dict.fromkeys(labels, (0.0, 1.0))

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        """Score predictions by example id.

        An example none of whose references has a word ("👍") cannot be scored: it is omitted, and a note names it.

        Raises:
            ValueError: the ids of predictions and references differ, or an example has no reference.
        """
        from rouge_score.rouge_scorer import RougeScorer  # imports nltk and scipy: seconds

        check_aligned(predictions, references)
        scorer = RougeScorer(list(self.labels), tokenizer=_Words())
        per_example: dict[str, dict[str, float]] = {}
        wordless: list[str] = []
        for key, texts in references.items():
            if not any(map(_words, texts)):
                wordless.append(key)
                continue
            best = scorer.score_multi(texts, predictions[key])
            per_example[key] = {name: float(best[name].fmeasure) for name in self.labels}
        note = f"rouge: no reference of {name_ids(wordless)} has a word; omitted: {len(wordless)} of {len(references)}"
        return Scores(
            corpus={
                name: sum(scores[name] for scores in per_example.values()) / len(per_example)
                for name in self.labels
                if per_example
            },
            per_example=per_example,
            notes=(note,) if wordless else (),
        )


class _Words:
    """A tokenizer as the library expects it."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).lower())
