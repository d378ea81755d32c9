"""The n-grams of captions as arrays: what BLEU and CIDEr count, once in the references and then in every prediction.

A word's id is its index in the vocabulary, an n-gram's id its index among the references' n-grams of that length, in
the order of (id of its first n - 1 words, its last word); those that no reference has are numbered after them.

Legend: W words of all captions concatenated, G distinct n-grams, C captions, I images (examples),
P distinct (image, n-gram) pairs, R distinct (caption, n-gram) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LONGEST = 4  # BLEU-4, and CIDEr's N
Ints = NDArray[np.int64]
_BITS = 32  # two ids share an int64


class Counts(NamedTuple):
    """How often the n-grams of one length occur in captions, ordered by (caption, n-gram)."""

    caption_R: Ints
    ngram_R: Ints
    count_R: Ints


@dataclass(frozen=True)
class Table:
    """The n-grams of one length in the references."""

    keys_G: Ints  # sorted: id of the first n - 1 words << 32 | id of the last word
    counts: Counts  # ordered by (image, n-gram, caption)
    pair_P: Ints  # sorted: image << 32 | n-gram
    first_P: Ints  # where the rows of the pair begin in counts
    rows_P: Ints  # how many there are: captions of the image that have the n-gram
    images_G: Ints  # how many images have the n-gram

    def find(self, image: Ints, ngram: Ints) -> tuple[NDArray[np.bool_], Ints]:
        """Which of these pairs the references have, and the places in ``pair_P`` of those."""
        _, known, place = _find(self.pair_P, image << _BITS | ngram)
        return known, place


@dataclass(frozen=True)
class NGrams:
    """The n-grams of all references: ``tables[n - 1]`` has those of n words."""

    vocabulary: dict[str, int]
    image_C: Ints
    words_C: Ints  # length of each caption
    tables: tuple[Table, ...]

    @property
    def images(self) -> int:
        """The number of examples."""
        return int(self.image_C[-1]) + 1

    def count(self, captions: Sequence[str]) -> tuple[Ints, list[Counts]]:
        """Words of each caption, and the counts of its n-grams by length; captions may have new words."""
        vocabulary = dict(self.vocabulary)
        word_W, words_C = _encode(captions, vocabulary)
        keys = [table.keys_G for table in self.tables]
        return words_C, [counts for counts, _ in _count(word_W, words_C, keys)]


def index(references: Sequence[Sequence[str]]) -> NGrams:
    """Index the tokenised references of every example, each of which has at least one."""
    vocabulary: dict[str, int] = {}
    word_W, words_C = _encode([caption for captions in references for caption in captions], vocabulary)
    image_C = np.repeat(np.arange(len(references)), [len(captions) for captions in references])
    nothing = [np.empty(0, np.int64)] * LONGEST
    tables = tuple(_table(counts, keys_G, image_C) for counts, keys_G in _count(word_W, words_C, nothing))
    return NGrams(vocabulary, image_C, words_C, tables)


def _encode(captions: Sequence[str], vocabulary: dict[str, int]) -> tuple[Ints, Ints]:
    """Ids of all words, and the number of words by caption; new words are added to the vocabulary."""
    split = [caption.split() for caption in captions]
    ids = [vocabulary.setdefault(word, len(vocabulary)) for words in split for word in words]
    return np.array(ids, np.int64), np.array([len(words) for words in split], np.int64)


def _count(word_W: Ints, words_C: Ints, known: Sequence[Ints]) -> list[tuple[Counts, Ints]]:
    """Count the n-grams of every length; with each length the keys of those that were not known."""
    caption_W = np.repeat(np.arange(len(words_C)), words_C)
    left_W = np.cumsum(words_C)[caption_W] - np.arange(len(word_W))  # words from here to the end of the caption
    ngram_W = np.zeros_like(word_W)
    found = []
    for n in range(1, LONGEST + 1):
        at = np.flatnonzero(left_W >= n)
        ids, keys = _number(ngram_W[at] << _BITS | word_W[at + n - 1], known[n - 1])
        ngram_W[at] = ids
        pairs, counts = np.unique(caption_W[at] << _BITS | ids, return_counts=True)
        found.append((Counts(pairs >> _BITS, pairs & (1 << _BITS) - 1, counts), keys))
    return found


def _number(keys: Ints, known: Ints) -> tuple[Ints, Ints]:
    """The id of every key: its place among the known ones, or after them; and the distinct new keys."""
    ids, hit, _ = _find(known, keys)
    new, inverse = np.unique(keys[~hit], return_inverse=True)
    ids[~hit] = len(known) + inverse
    return ids, new


def _find(among: Ints, keys: Ints) -> tuple[Ints, NDArray[np.bool_], Ints]:
    """Where each key is, or would be, in a sorted array; whether it is there; and the places of those that are."""
    place = np.searchsorted(among, keys)
    hit = place < len(among)
    hit[hit] = among[place[hit]] == keys[hit]
    return place, hit, place[hit]


def _table(counts: Counts, keys_G: Ints, image_C: Ints) -> Table:
    pair_R = image_C[counts.caption_R] << _BITS | counts.ngram_R
    order = np.argsort(pair_R, kind="stable")  # stable: captions stay in order
    pair_P, first_P, rows_P = np.unique(pair_R[order], return_index=True, return_counts=True)
    images_G = np.bincount(pair_P & (1 << _BITS) - 1, minlength=len(keys_G))
    return Table(keys_G, Counts(*(column[order] for column in counts)), pair_P, first_P, rows_P, images_G)
