"""Cloud machines as `ray up` would get them; no machine is started."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from clusters.launch import ray_up
from clusters.launch.job import write_files
from clusters.launch.launchers import LAUNCHERS
from harness.core.errors import UserError
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


def test_the_driver_is_ended_by_its_number_and_the_workers_are_let_go_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: list[Sequence[str]] = []
    monkeypatch.setattr(ray_up, "call", lambda command, *_: called.append(command))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    made = job(
        tmp_path, written_profile(tmp_path, PROFILE), run=str(tmp_path / "runs/grid"), output="s3://b/it's $HOME"
    )
    launch = LAUNCHERS["ray_up"].submit(made)
    words = called[-1]
    assert list(words[3:6]) == ["exec", "--tmux", f"{tmp_path}/runs/grid/launch/cluster.yaml"]
    # As the head's shell runs it, with programs that write down what they are called with.
    home = tmp_path / "head"
    (home / "bin").mkdir(parents=True)
    program = home / "bin/python"
    program.write_text(
        '#!/bin/bash\n[[ $2 == harness ]] && echo $$ > own\nprintf "%s|" "$RAY_ADDRESS" "$@"; echo\nexit 3\n'
    )
    program.chmod(0o755)
    environment = {"PATH": f"{home / 'bin'}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", words[-1]], cwd=home, env=environment, check=False)
    hold, release = "auto|-m|clusters.launch.ray_node|hold|1|1|1800|", "auto|-m|clusters.launch.ray_node|release|"
    done = "harness ended with exit code 3; the workers are let go"
    assert (home / "harness.log").read_text().splitlines() == [hold, done, release], "without workers nothing is run"
    program.write_text(program.read_text().replace("exit 3", "[[ $2 != harness ]]; exit $((3 * $?))"))
    subprocess.run(["bash", "-c", words[-1]], cwd=home, env=environment, check=False)
    run = "auto|-m|harness|run|experiment/grid.yaml|--profile|experiment/profile.yaml|--output|s3://b/it's $HOME|"
    assert (home / "harness.log").read_text().splitlines() == [hold, run, done, release]
    assert (home / "harness.pid").read_text() == (home / "own").read_text()
    said = LAUNCHERS["ray_up"].stop(launch)
    assert list(called[-1][3:]) == ["exec", launch.address, "kill -TERM $(cat harness.pid)"]
    assert said is not None
    assert said.endswith(f"the head is ended by `ray down {launch.address}`")


def test_files_keep_their_paths_and_names_are_for_a_shell(tmp_path: Path) -> None:
    made = job(tmp_path, written_profile(tmp_path, PROFILE), output="s3://bucket/runs")
    plugins = tmp_path / "plugins/a.py", tmp_path / "zwei Wörter.py"
    (text,) = LAUNCHERS["ray_up"].render(replace(made, plugins=plugins[:1])).values()
    assert yaml.safe_load(text)["file_mounts"]["~/experiment/plugins/a.py"] == str(plugins[0])
    with pytest.raises(
        UserError, match=r"zwei Wörter\.py: kind ray_up copies files by names of letters, digits and any"
    ):
        LAUNCHERS["ray_up"].render(replace(made, plugins=plugins))


def test_no_name_of_a_profile_takes_the_place_of_what_is_submitted(tmp_path: Path) -> None:
    run = str(tmp_path / "runs/grid")
    made = job(tmp_path, written_profile(tmp_path, PROFILE, "cluster"), run=run, output="s3://bucket/runs")
    files = LAUNCHERS["ray_up"].render(made)
    write_files(made, files)
    assert (made.folder / "cluster.yaml").read_text() == files["cluster.yaml"]
    assert "kind: ray_up" in made.profile_file.read_text()
