"""Checks of what a run talks to: MLflow, storage at a URL, and the nodes of a cluster."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clusters.profiles import Profile
from harness.core.errors import UserError
from harness.core.storage import Folder, StorageError
from harness.doctor.finding import Finding, fail, ok, warn
from harness.doctor.machine import clock
from harness.sweep.cluster import connect
from harness.sweep.nodes import node_name
from harness.sweep.ray_library import NodeAffinitySchedulingStrategy, ray
from harness.tracking.store import check_uri, default_uri, redacted, sqlite_path

_ANSWER_S = 120.0
_PROGRAMS = {"slurm": ("sbatch", "squeue"), "kuberay": ("kubectl",), "ray_up": ("ray", "ssh")}


def mlflow(output: Path) -> Iterator[Finding]:
    """Whether MLflow's store answers; one that a run will make is not made."""
    uri = default_uri(output)
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        yield ok("MLflow", f"{redacted(uri)}: made by the first run")
        return
    try:
        check_uri(uri, "MLFLOW_TRACKING_URI" if database is None else "tracking.mlflow_uri")
        yield ok("MLflow", f"{redacted(uri)} answers")
    except UserError as error:
        advice = "start it, or correct MLFLOW_TRACKING_URI; runs are refused until it answers"
        yield fail("MLflow", str(error), advice)


def stored(url: str) -> Iterator[Finding]:
    """Whether a URL can be written to and read."""
    name, content = f".doctor-{uuid.uuid4().hex}", uuid.uuid4().hex.encode()
    try:
        folder = Folder(url)
        with tempfile.TemporaryDirectory() as here:
            (Path(here) / name).write_bytes(content)
            folder.put([name], Path(here))
        read = folder.read(name)
        folder.remove([name])
    except (UserError, StorageError, OSError) as error:
        yield fail("storage", str(error), "look at the URL and its credentials (AWS_…, GOOGLE_…)")
        return
    if read == content:
        yield ok("storage", f"{url} can be written and read")
    else:
        yield fail("storage", f"{url}: a file that was just written reads otherwise", "use another storage")


def launcher(profile: Profile) -> Iterator[Finding]:
    """The programs with which a job is submitted."""
    for program in _PROGRAMS.get(profile.kind, ()):
        if shutil.which(program):
            yield ok("launcher", f"{program} is here")
        else:
            yield fail("launcher", f"{program}: not found", f"`harness launch` needs it for kind {profile.kind}")


class _Silent:
    """A display of a sweep that is none; what is noted of nodes is kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def opened(self, run: Path, at_once: int) -> None: ...

    def noted(self, line: str) -> None:
        self.lines.append(line)

    def abandoned(self, line: str) -> None:
        self.lines.append(line)

    def started(self, trial_id: str, place: str) -> None: ...

    def progressed(self, trial_id: str, progress: dict[str, Any]) -> None: ...

    def ended(self, record: Any) -> None: ...


def nodes(profile: Profile, output: Path) -> Iterator[Finding]:
    """Every node of the cluster: its libraries, its clock, and whether it sees and writes the run folders."""
    shown, folder = _Silent(), output / f".doctor-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True)
        with connect(profile, [], folder.resolve(), [], shown):
            yield from _each(folder.resolve())
        yield from (warn("nodes", line, "install the same versions on every node") for line in shown.lines)
    except (UserError, OSError) as error:
        yield fail("nodes", str(error), "every node needs the libraries and the folder of the runs")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _each(folder: Path) -> Iterator[Finding]:
    write = ray.remote(num_cpus=0, max_retries=0)(_writer())
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        name = node_name(node)
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        sent = time.time()
        try:
            problem, then = ray.get(
                write.options(scheduling_strategy=here).remote(str(folder), str(node["NodeID"])), timeout=_ANSWER_S
            )
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            yield fail("nodes", f"{name}: {str(error).splitlines()[0][:200]}", "look at Ray on this node")
            continue
        back = time.time()
        if problem or not (folder / str(node["NodeID"])).exists():
            reason = problem or "what it writes is not seen here"
            yield fail("nodes", f"{name}: {folder.parent}: {reason}", "mount the same file system at the same path")
        else:
            yield ok("nodes", f"{name} sees and writes {folder.parent}")
        yield from clock(name, max(sent - then, then - back, 0.0))


def _writer() -> Callable[[str, str], tuple[str | None, float]]:
    """The function that a node runs; it is pickled as code, because a node may lack this module."""

    def write(folder: str, name: str) -> tuple[str | None, float]:
        import time
        from pathlib import Path

        try:
            Path(folder, name).write_text("here", encoding="utf-8")
        except OSError as error:
            return error.strerror or str(error), time.time()
        return None, time.time()

    return write


def is_cluster(profile: Profile) -> bool:
    """Whether there is a cluster to look at: one that runs already."""
    return profile.kind == "ray" or bool(os.environ.get("RAY_ADDRESS"))
