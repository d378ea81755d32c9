"""Cloud machines as `ray up` would get them; no machine is started."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from clusters.launch import ray_up
from clusters.launch.launchers import LAUNCHERS
from tests.support.launching import job, written_profile

pytestmark = pytest.mark.quick

PROFILE = """\
kind: ray_up
storage: s3://bucket/runs
ray_up:
  provider: {type: aws, region: us-west-2}
  ssh_user: ubuntu
  head: {node_config: {InstanceType: m5.2xlarge}}
  worker: {node_config: {InstanceType: g5.xlarge}}
"""


def test_the_machines_get_a_token_that_only_its_file_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[Sequence[str]] = []
    monkeypatch.setattr(ray_up, "call", lambda command, *_: called.append(command))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    made = job(tmp_path, written_profile(tmp_path, PROFILE), run=str(tmp_path / "runs/grid"), output="s3://bucket/runs")
    launcher = LAUNCHERS["ray_up"]
    (text,) = launcher.render(made).values()
    record = launcher.submit(made)
    cluster = yaml.safe_load(text)
    file = Path(cluster["file_mounts"]["~/.ray/auth_token"])
    token = file.read_text(encoding="utf-8")
    assert len(token) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert token not in text + record.model_dump_json() + str(called)
    starts = [line for key in ("head", "worker") for line in cluster[f"{key}_start_ray_commands"] if " start " in line]
    assert all("RAY_AUTH_MODE=token " in line for line in [*starts, str(called[-1])])
    assert len(starts) == 2
    launcher.submit(made)
    assert file.read_text(encoding="utf-8") == token, "machines that run already have it"
