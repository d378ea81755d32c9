"""The process that measures, apart from the one that waits for it: ``python -m harness.trial.profile_process FD``.

It imports the libraries once, reads jobs as lines of JSON from standard input, and writes answers as lines of JSON to
the file descriptor FD; an empty line ends the answers to a job. Without a GPU, a copy of it (``fork``) reads the data
of a job, and every measurement is made in a copy of that copy, which has computed nothing before: its memory is its
own, and its death leaves the others alone. CUDA cannot be used in a copy: there the job runs in this process, and the
caller starts a process for each.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

import torch

from harness.model.build import TrialData, read_data
from harness.model.on_disk import disk_of
from harness.trial.engine import import_libraries
from harness.trial.measure import device_name
from harness.trial.probe import probe
from harness.trial.profile import Answer, Job, failure, interleave, peak_growth

Tell = Callable[[Answer], None]
_FORK: Any = multiprocessing.get_context("fork")


def main(answers: int) -> None:
    """Answer jobs until standard input ends."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(process)d %(name)s %(levelname)s %(message)s")
    import_libraries()
    cuda = torch.cuda.is_available()
    device = device_name(torch.device("cuda", 0) if cuda else torch.device("cpu"))
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        for line in sys.stdin:
            job = Job.model_validate_json(line)

            def tell(answer: Answer) -> None:
                _write(out, answer.model_copy(update={"device": device}).model_dump_json())

            if cuda:
                _measure(job, tell)
            else:
                _in_copies([(_measure_in_copies, job, 0)], 1, tell)
            _write(out, "")


def _write(out: TextIO, line: str) -> None:
    out.write(f"{line}\n")
    out.flush()


def _measure(job: Job, tell: Tell, data: TrialData | None = None) -> None:
    """Measure in this process."""

    def memory(index: int) -> Answer:
        return Answer(index=index, peak_bytes=peak_growth(job.specs[index], job.resources, data))

    def probed(index: int) -> Answer:
        return Answer(index=index, probed=probe(job.specs[index], job.resources, data))

    for measure, indices in ((memory, job.memory), (probed, job.probe)):
        for index in indices:
            tell(Answer(index=index, begun=True))
            try:
                tell(measure(index))
            except Exception as error:
                tell(failure(index, error))
    if job.speed:
        interleave(job, tell, data)


def _measure_in_copies(job: Job, tell: Tell) -> None:
    """Read the data, and measure it in copies of this process: memory several at a time, speed alone."""
    torch.set_num_threads(1)  # a pool of threads would not be in the copies, and they would wait for it
    try:
        data = read_data(job.specs[0], torch.device("cpu"), disk=disk_of(job.resources, Path(job.run)))
    except Exception as error:
        for index in range(len(job.specs)):
            tell(failure(index, error))
        return

    def measure(part: Job, answer: Tell) -> None:
        _measure(part, answer, data)

    parts = [job.model_copy(update={"memory": (index,), "speed": (), "probe": ()}) for index in job.memory]
    _in_copies([(measure, part, part.memory[0]) for part in parts], job.at_once, tell)
    probes = [job.model_copy(update={"memory": (), "speed": (), "probe": (index,)}) for index in job.probe]
    _in_copies([(measure, part, part.probe[0]) for part in probes], 1, tell)
    if job.speed:
        _in_copies([(measure, job.model_copy(update={"memory": (), "probe": ()}), 0)], 1, tell)


def _in_copies(parts: Sequence[tuple[Callable[[Job, Tell], None], Job, int]], at_once: int, tell: Tell) -> None:
    """Call functions in copies of this process, so many at a time, and pass on what they tell.

    Args:
        parts: a function, its job, and the number of the spec that it begins with.
        at_once: copies at a time.
        tell: receives the answers, and one for each copy that died.
    """
    waiting = list(parts)
    running: dict[Connection, tuple[Any, int]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            function, job, first = waiting.pop(0)
            ours, theirs = _FORK.Pipe(duplex=False)
            process = _FORK.Process(target=_child, args=(function, job, theirs))
            process.start()
            theirs.close()
            running[ours] = process, first
        for end in wait(list(running)):
            assert isinstance(end, Connection)  # noqa: S101 - what was passed
            process, index = running[end]
            try:
                answer = Answer.model_validate_json(end.recv())
                running[end] = process, answer.index
                tell(answer)
            except EOFError:
                del running[end]
                process.join()
                if process.exitcode:
                    tell(Answer(index=index, reason=_death(process.exitcode)))


def _child(function: Callable[[Job, Tell], None], job: Job, end: Connection) -> None:
    function(job, lambda answer: end.send(answer.model_dump_json()))
    end.close()


def _death(code: int) -> str:
    if code > 0:
        return f"its process ended with exit code {code}"
    name = str(-code)
    with suppress(ValueError):
        name = signal.Signals(-code).name
    return f"its process was killed ({name}{', probably out of memory' if -code == signal.SIGKILL else ''})"


if __name__ == "__main__":
    main(int(sys.argv[1]))
