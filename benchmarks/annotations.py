"""What reading a data set of VQAv2's size costs every trial: ``python benchmarks/annotations.py [--questions 200000]``.

Writes annotations like VQAv2's (ten answers for each question) over empty picture files, and reads them in processes of
their own: parsed as every trial would without a cache, and as they are found in the cache, in turn. Time and peak
memory beyond the libraries' are those until a trial has its examples: of a budget, and all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["red", "green", "blue", "two", "dog", "cat", "table", "man", "woman", "standing", "left", "nothing", "white"]
MIB = 1 << 20


def write(root: Path, name: str, first: int, questions: int) -> None:
    """Annotations of a split; five questions about each picture."""
    (root / name).mkdir(parents=True)
    asked, annotations = [], []
    for number in range(questions):
        image = first + number // 5
        if number % 5 == 0:
            (root / name / f"COCO_{name}_{image:012d}.jpg").touch()
        key = {"image_id": image, "question_id": 1000 * image + number % 5}
        words = [WORDS[(number * step + step) % len(WORDS)] for step in (3, 5, 7)]
        asked.append({**key, "question": f"What is the {words[0]} {words[1]} of the {words[2]} in picture {image}?"})
        answers = [
            {"answer": WORDS[(number + n // 6) % len(WORDS)], "answer_confidence": "yes", "answer_id": n + 1}
            for n in range(10)
        ]
        kind = {"question_type": "what is the", "answer_type": "other", "multiple_choice_answer": answers[0]["answer"]}
        annotations.append({**key, **kind, "answers": answers})
    for form, content in (
        (f"v2_OpenEnded_mscoco_{name}_questions", {"questions": asked}),
        (f"v2_mscoco_{name}_annotations", {"annotations": annotations}),
    ):
        (root / f"{form}.json").write_text(json.dumps(content), encoding="utf-8")


def read(root: str, budget: str, parse: bool) -> dict[str, float]:
    """Read the examples in this process, as a trial does."""
    from harness.model.budget import choose
    from tasks import parsed
    from tasks.splits import SPLITS
    from tasks.vqa import VQA, VQAConfig

    if parse:
        parsed.LEAST_BYTES = sys.maxsize
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    task = VQA(VQAConfig.model_validate({"root": root}))
    task.prepare()
    counts: dict[str, Any] = {"train": "all" if budget == "all" else int(budget), "validation": 1000, "test": 1000}
    chosen = [choose(task.examples(split), counts[split], 0, split) for split in SPLITS]
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_mib": (peak - before) * 1024 / MIB, "examples": sum(map(len, chosen))}


def measure(root: Path, budget: str, parse: bool) -> dict[str, float]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--read", str(root), "--budget", budget, *(["--parse"] if parse else [])]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HARNESS_CACHE": str(root / "cache")}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200_000, help="of training; a tenth as many to validate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--budget", default="10000", help=argparse.SUPPRESS)
    parser.add_argument("--parse", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        sys.stdout.write(json.dumps(read(given.read, given.budget, given.parse)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, "train2014", 1, given.questions)
        write(root, "val2014", 10_000_000, given.questions // 10)
        size = sum(path.stat().st_size for path in root.glob("*.json"))
        first = measure(root, "10000", parse=False)
        kept = sum(path.stat().st_size for path in root.glob("cache/annotations/*.arrow"))
        sys.stdout.write(
            f"{given.questions + given.questions // 10:,} questions, {size / MIB:.0f} MiB of JSON, "
            f"{kept / MIB:.0f} MiB kept; the first trial: {first['seconds']:.1f} s, {first['peak_mib']:.0f} MiB\n\n"
            "| examples of a trial | parsed: s | MiB | kept: s | MiB |\n|---|---|---|---|---|\n"
        )
        for budget in ("10000", "all"):
            rounds = [[measure(root, budget, parse) for parse in (True, False)] for _ in range(given.rounds)]
            cells = [
                f"{median(one[way][key] for one in rounds):.{digits}f}"
                for way in (0, 1)
                for key, digits in (("seconds", 1), ("peak_mib", 0))
            ]
            sys.stdout.write(f"| {rounds[0][0]['examples']:,.0f} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
