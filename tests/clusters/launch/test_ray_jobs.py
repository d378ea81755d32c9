"""Jobs of a running Ray cluster; Ray's command line is a stand-in that answers as Ray 2.60 does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from clusters.launch import ray_jobs
from clusters.launch.job import write_files
from clusters.launch.launchers import LAUNCHERS, goes_on
from harness.core.errors import UserError
from tests.support.launching import job, written_profile

PROFILE = "kind: ray\naddress: auto\njob_server: http://head:8265\nenv: {HF_HOME: /hf}\n"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The calls of ``ray job``; ``status`` answers with the words that are put last into the list."""
    calls: list[list[str]] = []

    def call(command: Sequence[str], timeout_s: float = 0) -> str:
        words = list(command[3:])
        if words[1] == "status":
            return calls[-1][0]
        calls.append(words)
        return ""

    monkeypatch.setattr(ray_jobs, "call", call)
    return calls


def test_a_job_is_submitted_with_its_command_and_environment(called: list[list[str]], tmp_path: Path) -> None:
    made = job(tmp_path, written_profile(tmp_path, PROFILE), run=str(tmp_path / "my runs/grid@2"))
    launcher = LAUNCHERS["ray"]
    launcher.check(made)
    write_files(made, launcher.render(made))
    launch = launcher.submit(made)
    assert called[0] == ["job", "list", "--address", "http://head:8265"]
    words = called[1]
    assert words[:4] == ["job", "submit", "--address", "http://head:8265"]
    assert launch.job_id.startswith("grid-2-")
    assert json.loads(words[words.index("--runtime-env-json") + 1]) == {"env_vars": {"HF_HOME": "/hf"}}
    command = words[words.index("--") + 1 :]
    assert command[1:5] == ["-m", "harness", "run", f"{tmp_path}/grid.yaml"]
    assert f"{tmp_path}/my runs/grid@2/launch/profile.yaml" in command  # one word
    assert launcher.log_command(launch, follow=True) is not None


@pytest.mark.parametrize(
    ("words", "state"),
    [("Status for job 'failed-1': RUNNING", "running"), ("Job 'failed-1' succeeded", "succeeded"), ("?", None)],
)
def test_the_state_is_in_rays_words(called: list[list[str]], tmp_path: Path, words: str, state: str | None) -> None:
    made = job(tmp_path, written_profile(tmp_path, PROFILE))
    launch = ray_jobs.submitted(made, "failed-1", address="http://head:8265")
    called.append([words])
    assert LAUNCHERS["ray"].state(launch) == state
    assert goes_on(state) == (state == "running")


def test_secrets_are_not_for_a_job(called: list[list[str]], tmp_path: Path) -> None:
    made = job(tmp_path, written_profile(tmp_path, f"{PROFILE}secrets: [HF_TOKEN]\n"))
    with pytest.raises(UserError, match=r"secrets: Ray shows the environment of a job .*; set HF_TOKEN on the nodes"):
        LAUNCHERS["ray"].check(made)
    assert called == []
