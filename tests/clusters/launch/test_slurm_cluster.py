"""A real Slurm on this machine: from sbatch to the leaderboard, through SIGTERM, a preemption and a time limit.

``make test-slurm``; as root, Debian's packages are installed if they are missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clusters.launch.job import write_files
from clusters.launch.launchers import LAUNCHERS
from harness.core.record import read_run
from tests.support import slurm
from tests.support.launching import job, written_profile

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

EXPERIMENT = """\
name: grid
task: {name: scenes, train_examples: 32, validation_examples: 8, test_examples: 8}
adapters:
  - {method: lora, rank: [2, 4, 8], grouping: [agnostic, specific], learning_rate: 6e-3}
budget: {examples: 24, epochs: 2}
optimizer: {per_device_train_batch_size: 8}
eval: {max_new_tokens: 8}
resources: {profile: false}
"""
TRIALS = 6
# One trial that takes longer than a job may: two minutes of training on two quiet cores.
LONG = EXPERIMENT.replace("[2, 4, 8], grouping: [agnostic, specific]", "2").replace("epochs: 2", "epochs: 600")


@pytest.fixture(scope="module")
def configured() -> Iterator[str]:
    """The configuration file of a cluster of two nodes with a CPU each."""
    if slurm.missing():
        slurm.install()
    if missing := slurm.missing():
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)")
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short, for sockets
    try:
        with slurm.cluster(folder / "s", nodes=2, cpus=1) as config:
            yield str(config)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def call(configured: str, tmp_path: Path) -> Callable[..., str]:
    """A function that runs a command in ``tmp_path`` and returns its output."""
    (tmp_path / "grid.yaml").write_text(EXPERIMENT, encoding="utf-8")

    def run(*command: str, code: int = 0) -> str:
        words = [sys.executable, "-m", "harness", *command[1:]] if command[0] == "harness" else list(command)
        environment = {**os.environ, "SLURM_CONF": configured}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


def launched(call: Callable[..., str], folder: Path, nodes: int, more: str = "") -> str:
    """Submit the experiment; the id of the job."""
    section = f"{{partition: low, nodes: {nodes}, cpus_per_task: 1{more}}}"
    written_profile(folder, f"kind: slurm\nslurm: {section}\n")
    text = call("harness", "launch", "grid.yaml", "--profile", "mine.yaml")
    assert text.startswith("submitted: slurm job ")
    return text.split()[3].rstrip(";")


def log_of(folder: Path, job: str) -> str:
    path = folder / "runs/grid/launch" / f"slurm-{job}.log"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def wait_for(reached: Callable[[], bool], folder: Path, job: str, timeout_s: float = 500) -> None:
    until = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < until, log_of(folder, job)
        time.sleep(0.5)


def records(folder: Path) -> dict[str, int]:
    """The times at which the records of finished trials were written."""
    run = folder / "runs/grid"
    found = read_run(run).records.values() if (run / "plan.json").exists() else ()
    ids = [record.trial_id for record in found if record.status == "finished"]
    return {name: (run / "trials" / name / "record.json").stat().st_mtime_ns for name in ids}


def end(call: Callable[..., str], folder: Path, job: str, trials: int = TRIALS, timeout_s: float = 500) -> str:
    """Wait for the end of the job; its log."""
    wait_for(lambda: "exit code 0" in log_of(folder, job), folder, job, timeout_s)
    wait_for(lambda: "COMPLETED" in call("squeue", "--states=all", f"--jobs={job}", "--format=%T"), folder, job, 120)
    assert len(records(folder)) == trials
    board = (folder / "runs/grid/report/leaderboard.md").read_text(encoding="utf-8")
    assert board.count("| LoRA r=") == trials
    return log_of(folder, job)


def test_slurm_reads_unusual_names_as_they_are(call: Callable[..., str], tmp_path: Path) -> None:
    names = (
        "two words",
        "it's",
        'a"b',
        "$HOME",
        f"$(touch {tmp_path.name})",
        "`x`",
        "Wörter 日本",
        "50%j",
        "a#b",
        "-x",
        "a;b&",
    )
    for number, name in enumerate(names):
        run = tmp_path / str(number) / name
        made = job(tmp_path, written_profile(tmp_path, "kind: slurm\nslurm: {partition: low}\n"), run=str(run))
        script = LAUNCHERS["slurm"].render(replace(made, name=name))["sbatch.sh"]
        head = [line for line in script.splitlines() if line.startswith("#")]
        write_files(made, {"sbatch.sh": "\n".join([*head, 'echo "$SLURM_JOB_NAME"', ""])})
        number_of = call("sbatch", "--wait", "--parsable", str(made.folder / "sbatch.sh")).strip()
        assert (made.folder / f"slurm-{number_of}.log").read_text(encoding="utf-8") == f"{name}\n"
    assert not (tmp_path / tmp_path.name).exists()


def test_a_job_that_gets_sigterm_half_way_is_queued_again_and_goes_on(call: Callable[..., str], tmp_path: Path) -> None:
    job = launched(call, tmp_path, nodes=1)
    assert f"slurm job {job}, " in call("harness", "status", "runs/grid")
    call("harness", "launch", "grid.yaml", "--profile", "mine.yaml", code=2)  # one at a time
    wait_for(lambda: len(records(tmp_path)) >= 2, tmp_path, job)
    before = records(tmp_path)
    call("scancel", "--signal=TERM", job)
    wait_for(lambda: "exit code 143" in log_of(tmp_path, job), tmp_path, job, 60)
    assert (tmp_path / "runs/grid/report/leaderboard.md").exists()
    text = end(call, tmp_path, job)
    assert before.items() <= records(tmp_path).items()  # no finished trial was run again
    assert text.count("queued again, to go on") == 1
    assert "start 2" in text
    assert " failed:" not in text
    assert call("harness", "logs", "runs/grid") == text


def test_a_preempted_job_of_two_nodes_goes_on_when_it_gets_them_back(call: Callable[..., str], tmp_path: Path) -> None:
    job = launched(call, tmp_path, nodes=2)
    wait_for(lambda: len(records(tmp_path)) >= 2, tmp_path, job)
    assert "2 nodes, 2 CPUs" in log_of(tmp_path, job)
    before = records(tmp_path)
    call("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 3")
    wait_for(lambda: "exit code 143" in log_of(tmp_path, job), tmp_path, job, 60)  # the partition's GraceTime
    text = end(call, tmp_path, job)
    assert before.items() <= records(tmp_path).items()
    assert "start 2" in text
    assert " failed:" not in text


@pytest.mark.timeout(1800)
def test_a_trial_that_is_longer_than_the_time_limit_goes_on_in_the_next_job(
    call: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "grid.yaml").write_text(LONG, encoding="utf-8")
    # Slurm sends SIGUSR1 a minute before the limit, or up to a minute earlier; at the limit it would end the job.
    job = launched(call, tmp_path, nodes=1, more=', time: "3", grace_s: 60')
    assert "3:00" in call("squeue", f"--jobs={job}", "--format=%l")
    text = end(call, tmp_path, job, trials=1, timeout_s=1500)
    starts = text.count("queued again, to go on")
    assert starts >= 1
    assert text.count("harness ended with exit code 143") == starts
    assert f"start {starts + 1}" in text
    assert "DUE TO TIME LIMIT" not in text  # every job ended before it
    assert " failed:" not in text
    (record,) = read_run(tmp_path / "runs/grid").records.values()
    assert [point.epoch for point in record.history] == list(range(1, 601))  # each epoch once
    assert "resumed after epoch " in call("harness", "logs", "runs/grid", record.trial_id)


def test_harness_stop_ends_a_job_for_good(call: Callable[..., str], tmp_path: Path) -> None:
    job = launched(call, tmp_path, nodes=1)
    wait_for(lambda: len(records(tmp_path)) >= 1, tmp_path, job)
    assert f"job {job} got SIGTERM" in call("harness", "stop", "runs/grid")
    wait_for(lambda: "exit code 3" in log_of(tmp_path, job), tmp_path, job, 60)
    wait_for(lambda: "FAILED" in call("squeue", "--states=all", f"--jobs={job}", "--format=%T"), tmp_path, job, 60)
    assert "ended by harness stop: finished trials are kept" in log_of(tmp_path, job)
    call("harness", "stop", "runs/grid", code=2)  # nothing runs
    waiting = launched(call, tmp_path, nodes=1, more=", options: [--hold]")
    assert f"slurm job {waiting}, PENDING; " in call("harness", "status", "runs/grid")
    assert f"job {waiting} was waiting and is cancelled" in call("harness", "stop", "runs/grid")
