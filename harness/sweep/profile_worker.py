"""Starts and ends the process that measures, and passes jobs and answers: see harness/trial/profile_process.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch

from harness.trial.profile import Answer, Job

_PROGRAM = "harness.trial.profile_process"
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Worker:
    """The measuring process, started when it is needed; all of its copies end with it.

    Args:
        log: what it writes to standard output and standard error; removed at the end if that is nothing.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[str] | None = None
        self._answers: TextIO | None = None

    def __enter__(self) -> Worker:
        self.log.unlink(missing_ok=True)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()
        if self.log.is_file() and self.log.stat().st_size == 0:
            self.log.unlink()

    def ask(self, job: Job) -> Iterator[Answer]:
        """The answers to a job, as they come. Fewer than were asked for if the process died."""
        if not torch.cuda.is_available():
            yield from self._ask(job)
            return
        # Every measurement of memory in a process of its own, which a copy could not be: see profile_process.py.
        parts = [job.model_copy(update={"memory": (index,), "speed": (), "probe": ()}) for index in job.memory]
        parts += [job.model_copy(update={"memory": (), "speed": (), "probe": (index,)}) for index in job.probe]
        for part in [*parts, *([job.model_copy(update={"memory": (), "probe": ()})] if job.speed else [])]:
            yield from self._ask(part)
            self.stop()

    def _ask(self, job: Job) -> Iterator[Answer]:
        process, answers = self._started()
        assert process.stdin is not None  # noqa: S101 - a pipe
        with suppress(BrokenPipeError):
            process.stdin.write(job.model_dump_json() + "\n")
            process.stdin.flush()
        for line in answers:
            if not line.strip():
                return
            yield Answer.model_validate_json(line)
        self.stop()  # it ended without the empty line

    def _started(self) -> tuple[subprocess.Popen[str], TextIO]:
        if self._process is None or self._answers is None:
            ours, theirs = os.pipe()
            with self.log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", _PROGRAM, str(theirs)],
                    stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(theirs,), text=True,
                    env={**os.environ, **_ENVIRONMENT},
                    start_new_session=True,  # Ctrl-C is for us, and ends its copies with it
                )  # fmt: skip
            os.close(theirs)
            self._answers = os.fdopen(ours, encoding="utf-8")
        return self._process, self._answers

    def stop(self) -> None:
        """End the process and its copies."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        if self._answers is not None:
            self._answers.close()
        self._process = self._answers = None
