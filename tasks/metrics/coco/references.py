"""References as the caption metrics need them, prepared once for every distinct set, in memory and on disk.

Java's output is stored as JSON below ``$HARNESS_CACHE/references``, by default ``~/.cache/harness``. The
n-grams are counted again in each process, which is faster than reading them.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from harness.core.files import atomic
from tasks.metrics.coco import meteor, ngrams, ptb
from tasks.metrics.coco.meteor import normalise
from tasks.metrics.coco.ptb import tokenise

# Part of the file name: another format, tokenizer or normaliser uses another file.
_VERSION = ["1", ptb.JAR.name, meteor.JAR]

Texts: TypeAlias = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class References:
    """The references of some examples, in their order."""

    tokenised: Texts  # without those that have no words; an example may have none
    normalised: Mapping[str, str]  # what METEOR reads instead, if different

    @cached_property
    def ngrams(self) -> ngrams.NGrams:
        """Their n-grams; every example must have a reference."""
        return ngrams.index(self.tokenised)

    @cached_property
    def all_alike(self) -> bool:
        """Whether all examples have the same references, such as a single example."""
        return len({frozenset(captions) for captions in self.tokenised}) < 2


@lru_cache(maxsize=4)  # a trial's validation and test set, and those of another task; 5,000 images are some 50 MB
def prepare(references: Texts) -> References:
    """Tokenise and normalise references, or read the file that an earlier process wrote.

    Warns if the file cannot be written: the next process then repeats the work.

    Raises:
        RuntimeError: Java failed.
    """
    path = cache_file(references)
    if (found := _read(path)) is not None:
        return found
    tokenised = iter(tokenise([caption for captions in references for caption in captions]))
    kept = tuple(tuple(filter(str.strip, islice(tokenised, len(captions)))) for captions in references)
    prepared = References(kept, normalise(caption for captions in kept for caption in captions))
    try:
        _write(path, prepared)
    except OSError as error:
        warnings.warn(f"tokenised references cannot be cached in {path.parent}: {error}", stacklevel=2)
    return prepared


def cache_file(references: Texts) -> Path:
    """The cache file of these references, named by the SHA-256 of the texts, the format and the jars' versions."""
    cache = Path(os.environ.get("HARNESS_CACHE") or "~/.cache/harness").expanduser()
    key = hashlib.sha256(json.dumps([_VERSION, references]).encode()).hexdigest()
    return cache / "references" / f"{key}.json"


def _write(path: Path, prepared: References) -> None:
    """Write atomically: the SHA-256 of the second line, then JSON."""
    content = json.dumps(asdict(prepared)).encode()
    with atomic(path) as partial:
        partial.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def _read(path: Path) -> References | None:
    """Read what ``_write`` wrote; None if it is missing or damaged."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    found = json.loads(content)
    tokenised = tuple(tuple(captions) for captions in found["tokenised"])
    return References(tokenised, found["normalised"])
