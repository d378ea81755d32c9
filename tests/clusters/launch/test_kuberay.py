"""Calls of kubectl; no cluster of Kubernetes is reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from clusters.launch import kuberay
from clusters.launch.job import Job
from clusters.launch.launchers import LAUNCHERS, goes_on
from harness.core.errors import UserError
from tests.support.launching import job, written_profile

PROFILE = "kind: kuberay\nstorage: {storage}\nkuberay: {{image: registry/harness, namespace: peft{more}}}\n"


def made(folder: Path, storage: str = "s3://bucket/runs", more: str = "", top: str = "") -> Job:
    return job(folder, written_profile(folder, PROFILE.format(storage=storage, more=more) + top), output=storage)


@pytest.fixture
def kubectl(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The answers of kubectl by the words after the namespace; what is not in it is not found."""
    answers: dict[str, str] = {}

    def call(command: Sequence[str], timeout_s: float = 0) -> str:
        assert list(command[:3]) == ["kubectl", "--namespace", "peft"]
        words = " ".join(command[3:])
        for beginning, answer in answers.items():
            if words.startswith(beginning):
                return answer
        raise UserError(f"kubectl {words}: exit code 1: Error from server (NotFound)")

    monkeypatch.setattr(kuberay, "call", call)
    monkeypatch.setattr(kuberay, "check_program", lambda *_: None)
    return answers


def test_a_job_is_created_asked_and_ended(kubectl: dict[str, str], tmp_path: Path) -> None:
    launcher, grid = LAUNCHERS["kuberay"], made(tmp_path)
    launcher.check(grid)
    kubectl["apply -f /shared/runs/grid/launch/rayjob.yaml"] = ""
    launch = launcher.submit(grid)
    assert (launch.job_id, launch.address) == ("grid", "peft")
    assert launcher.state(launch) == "ended"
    kubectl["get rayjob grid -o jsonpath={.status.jobDeploymentStatus}"] = "Running"
    assert goes_on(launcher.state(launch))
    kubectl["get rayjob grid -o jsonpath={.status.rayClusterName}"] = "grid-x7"
    kubectl["get pods --selector=ray.io/cluster=grid-x7,ray.io/node-type=head"] = "pod/grid-x7-head\n"
    kubectl["exec pod/grid-x7-head -- python -c import psutil; "] = ""
    assert launcher.stop(launch) == "the driver in pod/grid-x7-head got SIGTERM"


@pytest.mark.parametrize(
    ("storage", "more", "top", "says"),
    [
        ("/elsewhere/runs", ", volume_claim: data", "", r"storage: found '/elsewhere/runs'; .*mount_path \(/shared\)"),
        ("/shared/runs", "", "", r"storage: found '/shared/runs'; .* with a volume_claim"),
        ("s3://bucket/runs", "", "secrets: [HF_TOKEN]\n", r"kuberay\.secret: secrets needs the name of a Secret"),
    ],
)
def test_what_the_pods_could_not_reach_is_refused(
    kubectl: dict[str, str], tmp_path: Path, storage: str, more: str, top: str, says: str
) -> None:
    launcher, grid = LAUNCHERS["kuberay"], made(tmp_path, storage, more, top)
    with pytest.raises(UserError, match=says):  # noqa: PT012
        launcher.render(grid)
        launcher.check(grid)
    assert kubectl == {}


def test_two_plugins_of_one_name_do_not_fit_into_a_config_map(tmp_path: Path) -> None:
    files = tuple(tmp_path / folder / "mine.py" for folder in ("a", "b"))
    for path in files:
        path.parent.mkdir()
        path.write_text("x = 1\n")
    grid = made(tmp_path)
    with pytest.raises(UserError, match=r"b/mine\.py: another file of this experiment is called mine\.py too"):
        LAUNCHERS["kuberay"].render(replace(grid, plugins=files))
