"""Word and character error rate of transcripts, counted by jiwer 4 (https://github.com/jitsi/jiwer)."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import jiwer

from harness.core.record import Formula
from tasks.base import Metric, Scores
from tasks.metrics.alignment import check_aligned, name_ids

_without_punctuation = jiwer.RemovePunctuation()


def normalise(text: str) -> str:
    """Normalise a text before errors are counted: lower case, no punctuation, single spaces.

    Corpora differ in case and punctuation for the same words (LibriSpeech is upper case without either), and neither
    is audible. Punctuation is Unicode's class P, removed without a space: "don't" is the word "dont", "well-known" is
    "wellknown". An accented letter is one character (NFC). Numbers, symbols and abbreviations stay as they are:
    spelling them out needs language-specific rules, so "7" for "seven" is an error.
    """
    composed = unicodedata.normalize("NFC", text.lower())
    return " ".join(_without_punctuation(composed).split())


class _Count(NamedTuple):
    """Edits against one reference, and the reference's length in words or characters."""

    edits: int
    length: int

    @property
    def rate(self) -> float:
        return self.edits / self.length


class ErrorRate(Metric):
    """Substitutions, deletions and insertions as a share of the reference: ``wer`` of words, ``cer`` of characters.

    0 is perfect; insertions can raise a rate above 1. Over the corpus it is all edits / all reference words (not the
    mean of the examples' rates), as in speech recognition; characters include the spaces between words. Texts are
    normalised first (``normalise``). Of several references the one with the lowest rate counts, for words and for
    characters separately, with its edits and its length; one without words is ignored. An empty prediction is all
    deletions.
    """

    labels: ClassVar[Mapping[str, str]] = {"wer": "WER", "cer": "CER"}
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"wer", "cer"})
    corpus: ClassVar[Mapping[str, Formula]] = {"wer": "ratio", "cer": "ratio"}
    bounds: ClassVar[Mapping[str, tuple[float | None, float | None]]] = dict.fromkeys(("wer", "cer"), (0.0, None))

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        """Score predictions by example id; ``per_example`` is in the order of ``references``.

        Raises:
            ValueError: there are no examples, the ids of predictions and references differ, or an example has no
                reference with a word in it.
        """
        check_aligned(predictions, references)
        spoken = {key: list(filter(None, map(normalise, texts))) for key, texts in references.items()}
        if wordless := [key for key, texts in spoken.items() if not texts]:
            raise ValueError(f"no word in any reference of {name_ids(wordless)}")
        pairs = [(key, text) for key, texts in spoken.items() for text in texts]
        reference = [text for _, text in pairs]
        hypothesis = [normalise(predictions[key]) for key, _ in pairs]

        corpus: dict[str, float] = {}
        per_example: dict[str, dict[str, float]] = {key: {} for key in references}
        found: dict[str, dict[str, tuple[float, ...]]] = {key: {} for key in references}
        for name, process in (("wer", jiwer.process_words), ("cer", jiwer.process_characters)):
            counts = _counts(process(reference, hypothesis))
            best: dict[str, _Count] = {}
            for (key, _), count in zip(pairs, counts, strict=True):
                best[key] = min(best.get(key, count), count, key=lambda count: (count.rate, count.edits))
            corpus[name] = sum(count.edits for count in best.values()) / sum(count.length for count in best.values())
            for key, count in best.items():
                per_example[key][name] = count.rate
                found[key][name] = tuple(count)
        return Scores(corpus, per_example, counts=found)


def _counts(output: jiwer.WordOutput | jiwer.CharacterOutput) -> list[_Count]:
    """Count the edits of each pair of texts in jiwer's alignments."""
    return [
        _Count(
            sum(
                max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                for chunk in chunks
                if chunk.type != "equal"
            ),
            len(reference),
        )
        for chunks, reference in zip(output.alignments, output.references, strict=True)
    ]
