"""A private Slurm on this machine: munged, a controller, and one slurmd for each of its nodes, in a temporary folder.

Debian's packages slurm-wlm and munge are enough; nothing of the system is configured, and no service is started.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
# A requeued job waits until its credential has expired, by default for two minutes.
# Two partitions of the same nodes: a job in `high` preempts one in `low`, which is queued again.
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=30
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SchedulerParameters=bf_interval=2,sched_interval=2
KillWait=10
MessageTimeout=60
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that are not on the PATH."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def install() -> None:
    """Install Debian's packages without starting their services; does nothing unless root on a Debian."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]):
        subprocess.run(["apt-get", "-qq", *command], env=environment, check=True, stdout=subprocess.DEVNULL)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def cluster(folder: Path, nodes: int = 1, cpus: int = 2) -> Iterator[Path]:
    """A running cluster of so many nodes ``n1``, ``n2`` …, each a slurmd on this machine.

    Args:
        folder: short: sockets are in it.
        nodes: their number.
        cpus: of each node, as Slurm counts them; more than the machine has are allowed.

    Yields:
        The configuration file, for ``SLURM_CONF``.
    """
    config = _configure(folder, nodes, cpus)
    environment = {**os.environ, "SLURM_CONF": str(config)}
    with ExitStack() as stack:

        def start(name: str, command: Sequence[str]) -> None:
            log = stack.enter_context((folder / f"{name}.out").open("w"))
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            stack.callback(_stop, process)

        start("munged", [*_munged(folder), "--foreground"])
        _wait((folder / "munge.socket").exists, "munged", folder)
        start("slurmctld", ["slurmctld", "-D", "-f", str(config)])
        for number in range(1, nodes + 1):
            start(f"n{number}", ["slurmd", "-D", "-f", str(config), "-N", f"n{number}"])
        _wait(lambda: _idle(environment) == nodes, "the nodes", folder)
        try:
            yield config
        finally:  # jobs end before what would end them
            for state in ("PENDING", "RUNNING"):  # scancel takes one
                subprocess.run(["scancel", f"--state={state}"], env=environment, check=False)
            with suppress(TimeoutError):
                _wait(lambda: _idle(environment) == nodes, "idle nodes", folder)


def _configure(folder: Path, nodes: int, cpus: int) -> Path:
    (folder / "state").mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    controller_port, *ports = _free_ports(nodes + 1)
    lines = []
    for number, port in enumerate(ports, 1):
        (folder / f"spool.n{number}").mkdir()
        lines.append(f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN")
    config = folder / "slurm.conf"
    text = _CONFIG.format(folder=folder, host=host, controller_port=controller_port, nodes="\n".join(lines))
    config.write_text(text)
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    return config


def _munged(folder: Path) -> list[str]:
    names = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log",
             "seed-file": "munge.seed"}  # fmt: skip
    # Temporary folders are writable to all, which munged takes for unsafe.
    return ["munged", "--force", *(f"--{option}={folder / name}" for option, name in names.items())]


def _idle(environment: dict[str, str]) -> int:
    found = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.split().count("idle")


def _wait(is_so: Callable[[], bool], what: str, folder: Path, timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > until:
            logs = "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
            raise TimeoutError(f"{what} did not start in {timeout_s:g} s\n{logs}")
        time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
