"""References as the caption metrics need them, prepared once for every distinct set: kept in memory and on disk.

On disk is what Java made of them, as JSON below ``$HARNESS_CACHE/references``, by default ``~/.cache/harness``. The
n-grams are counted anew in each process, which takes less time than reading them would save.
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

from harness.files import atomic
from tasks.metrics import meteor_process, ngrams, ptb
from tasks.metrics.meteor_process import normalise
from tasks.metrics.ptb import tokenise

# Part of a file's name: another format, tokenizer or normaliser is another file.
_VERSION = ["1", ptb.JAR.name, meteor_process.JAR]

Texts: TypeAlias = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class References:
    """The references of some examples, in their order."""

    tokenised: Texts  # without those that have no words; an example may have none left
    normalised: Mapping[str, str]  # what METEOR reads instead, where it is another text

    @cached_property
    def ngrams(self) -> ngrams.NGrams:
        """Their n-grams; every example must have a reference."""
        return ngrams.index(self.tokenised)

    @cached_property
    def all_alike(self) -> bool:
        """Whether all examples have the same references, one example above all."""
        return len({frozenset(captions) for captions in self.tokenised}) < 2


@lru_cache(maxsize=4)  # a trial's validation and test set, and those of another task; 5,000 images are some 50 MB
def prepare(references: Texts) -> References:
    """Tokenise and normalise references, or read the file in which an earlier process left them.

    Warns where the file cannot be written: the next process then does the work again.

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
        warnings.warn(f"tokenised references cannot be kept in {path.parent}: {error}", stacklevel=2)
    return prepared


def cache_file(references: Texts) -> Path:
    """Where these references are kept: named by the SHA-256 of the texts, the format and the versions of the jars."""
    cache = Path(os.environ.get("HARNESS_CACHE") or "~/.cache/harness").expanduser()
    key = hashlib.sha256(json.dumps([_VERSION, references]).encode()).hexdigest()
    return cache / "references" / f"{key}.json"


def _write(path: Path, prepared: References) -> None:
    """Write in one step, so that no process reads half a file: the SHA-256 of the second line, then JSON."""
    content = json.dumps(asdict(prepared)).encode()
    with atomic(path) as partial:
        partial.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def _read(path: Path) -> References | None:
    """Read what ``_write`` wrote; None where there is nothing, or where it is not whole."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    found = json.loads(content)
    tokenised = tuple(tuple(captions) for captions in found["tokenised"])
    return References(tokenised, found["normalised"])
