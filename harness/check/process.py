"""Checks of tasks that need another process: the same data for every hash seed, and no import of torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.check.task import Splits, TaskSubject, read
from tasks.registry import TASKS

TIMEOUT_S = 120


def content(splits: Splits) -> str:
    """A digest of all examples, with the content of files instead of their paths."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for e in examples:
            inputs = [(c, v if isinstance(v, str) else hashlib.sha256(v.read_bytes()).hexdigest()) for c, v in e.inputs]
            digest.update(repr((split, e.id, inputs, e.references, e.target, e.member)).encode())
    return digest.hexdigest()


def another_process_agrees(subject: TaskSubject) -> Iterator[str]:
    """Another process reads the same examples, and importing the task does not import torch."""
    yield from elsewhere([subject], subject.folder.with_name(f"{subject.folder.name}-elsewhere"))[subject.target]


def elsewhere(subjects: Sequence[TaskSubject], cache: Path) -> dict[str, list[str]]:
    """Import and read tasks in a new process with another hash seed and another cache.

    Args:
        subjects: the tasks on their samples.
        cache: a folder that is empty or does not exist.

    Returns:
        Target of the task → what is wrong.
    """
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    env = {**os.environ, "HARNESS_CACHE": str(cache), "PYTHONHASHSEED": seed}
    asked = {subject.target: subject.options.decode() for subject in subjects}
    process = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(asked), env=env, text=True, capture_output=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:]
        return {target: [f"another process failed: {' '.join(last)}"] for target in asked}
    answers = json.loads(process.stdout)
    problems: dict[str, list[str]] = {}
    for subject in subjects:
        target = subject.target
        found, problems[target] = answers[target], []
        if found["torch"]:
            problems[target].append(
                "importing it imports torch, which takes seconds whenever an experiment is planned; import torch in "
                "the functions that use it"
            )
        if found["content"] != content(subject.splits):
            problems[target].append(
                "another process reads different examples: they depend on the order of a set, on hash() or on time"
            )
    return problems


def main() -> None:
    """Read targets and options from stdin, and write what was found to stdout."""
    asked: dict[str, str] = json.load(sys.stdin)
    answers: dict[str, dict[str, object]] = {}
    with contextlib.redirect_stdout(sys.stderr):  # a plugin may print
        for target in asked:
            before = "torch" in sys.modules
            TASKS.load(target)
            answers[target] = {"torch": not before and "torch" in sys.modules}
        for target, options in asked.items():
            task_class = TASKS.load(target)
            task = task_class(task_class.Config.model_validate_json(options, strict=True))
            task.prepare()
            answers[target]["content"] = content(read(task))
    print(json.dumps(answers))  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
