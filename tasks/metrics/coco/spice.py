"""SPICE (Anderson et al. 2016, https://arxiv.org/abs/1607.08822): pycocoevalcap 1.2's jar, if it can run.

It needs what the library does not ship: Stanford CoreNLP 3.6.0 with its models, and a Java of version 8 to 14 (it
writes its result with the JavaScript engine that Java 15 dropped). The library downloads the former when its class is
created; here nothing is downloaded, and ``missing`` returns what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocoevalcap.spice import get_stanford_models
from pycocoevalcap.spice import spice as library

FOLDER = Path(library.__file__).parent
MODELS = "HARNESS_SPICE_MODELS"  # a folder with both jars; default: the library's own folder for its download
JAVA = "HARNESS_SPICE_JAVA"  # path of the executable
_JARS = (f"{get_stanford_models.JAR}.jar", f"{get_stanford_models.JAR}-models.jar")


def missing() -> str | None:
    """A sentence that says why SPICE cannot be computed; None: it can."""
    folder = _models()
    if lacking := [jar for jar in _JARS if not (folder / jar).is_file()]:
        return f"SPICE was not computed: {' and '.join(lacking)} not found in {folder} ({MODELS}); see docs/metrics.md"
    java = os.environ.get(JAVA)
    if not java or not os.access(java, os.X_OK):
        found = f"{java!r} is not a program" if java else "it is not set"
        return f"SPICE was not computed: {JAVA} must name a Java of version 8 to 14, {found}; see docs/metrics.md"
    return None


def files() -> tuple[Path, ...]:
    """The jars that SPICE runs; none where it cannot run."""
    if missing():
        return ()
    return (FOLDER / library.SPICE_JAR, *sorted({*(FOLDER / "lib").glob("*.jar"), *_models().glob("*.jar")}))


def spice(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> tuple[float, list[float]]:
    """Score tokenised captions in a separate Java process; parses of captions are cached below ``$HARNESS_CACHE``.

    Args:
        references: for every example its tokenised captions, at least one.
        predictions: for every example its tokenised prediction.

    Returns:
        The mean, and the F-score of every example; between 0 and 1.

    Raises:
        RuntimeError: Java failed, or did not give one number per example.
    """
    items = [
        {"image_id": i, "test": prediction, "refs": list(texts)}
        for i, (texts, prediction) in enumerate(zip(references, predictions, strict=True))
    ]
    cache = Path(os.environ.get("HARNESS_CACHE") or "~/.cache/harness").expanduser() / "spice"
    cache.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([library.SPICE_JAR, "lib/*", f"{_models()}/*"])
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "in.json"), Path(folder, "out.json")
        given.write_text(json.dumps(items), encoding="utf-8")
        options = ("-cache", str(cache), "-out", str(found), "-silent")
        command = [os.environ[JAVA], "-Xmx8G", "-cp", path, "edu.anu.spice.SpiceScorer", str(given), *options]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, check=False)
        if done.returncode != 0 or not found.is_file():
            detail = done.stderr.decode(errors="replace")[-1000:].strip() or "no message"
            raise RuntimeError(f"SPICE failed with exit code {done.returncode}: {detail}")
        per_example = _by_id(found.read_text(encoding="utf-8"), len(items))
    return float(np.mean(per_example)), per_example


def _models() -> Path:
    return Path(os.environ.get(MODELS) or FOLDER / get_stanford_models.SPICELIB).expanduser().resolve()


def _by_id(result: str, examples: int) -> list[float]:
    """The F-score of every example, in the order of their ids rather than of the result."""
    try:
        scores = {item["image_id"]: float(item["scores"]["All"]["f"]) for item in json.loads(result)}
    except (ValueError, TypeError, KeyError) as error:
        raise RuntimeError(
            f"SPICE did not return an F-score for every example ({type(error).__name__}: {error})"
        ) from error
    if scores.keys() != set(range(examples)) or not np.isfinite(list(scores.values())).all():
        raise RuntimeError(f"SPICE was given {examples} examples and returned scores of {len(scores)}")
    return [scores[i] for i in range(examples)]
