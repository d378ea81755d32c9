"""The real kubectl against an API server of our own, and calls of kubectl that it cannot answer."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from clusters.launch import kuberay
from clusters.launch.job import Job, Launch, write_files, write_launch
from clusters.launch.launchers import LAUNCHERS, goes_on
from harness.core.errors import UserError
from tests.support.kuberay import RayJobManifest
from tests.support.kubernetes import Api, api_server
from tests.support.launching import job, written_profile

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl (Debian: kubernetes-client)")
PROFILE = "kind: kuberay\nstorage: {storage}\nkuberay: {{image: registry/harness, namespace: peft{more}}}\n"
LAUNCHER = LAUNCHERS["kuberay"]


def made(folder: Path, storage: str = "s3://bucket/runs", more: str = "", top: str = "", run: str = "grid") -> Job:
    profile = written_profile(folder, PROFILE.format(storage=storage, more=more) + top)
    return job(folder, profile, run=str(folder / "runs" / run), output=storage)


def launched(grid: Job) -> Launch:
    """As ``harness launch`` does it."""
    LAUNCHER.check(grid)
    write_files(grid, LAUNCHER.render(grid))
    launch = LAUNCHER.submit(grid)
    write_launch(grid.folder, launch)
    return launch


def wrong(manifest: dict[str, Any]) -> str | None:
    """What the typed subset of the reference says; kubectl adds annotations."""
    metadata = {key: value for key, value in manifest["metadata"].items() if key != "annotations"}
    try:
        RayJobManifest.model_validate({**manifest, "metadata": metadata})
    except ValidationError as error:
        return str(error)
    return None


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A Kubernetes that kubectl reaches."""
    made = Api(judge=wrong)
    with api_server(made, tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.setenv("KUBECACHEDIR", str(tmp_path / "kubectl"))
        yield made


def test_a_label_of_dns_is_made_of_any_name(tmp_path: Path) -> None:
    names = {run: yaml_name(made(tmp_path, run=run)) for run in ("grid", "grid@2", "2024", "Grid", "日本", "x" * 60)}
    assert names["grid"] == "grid"
    assert names["grid@2"].startswith("grid-2-")
    assert names["2024"].startswith("run-2024-")  # a digit first is refused by the operator
    assert names["日本"].startswith("run-")
    assert len(set(names.values())) == len(names)
    assert max(map(len, names.values())) == 47


def yaml_name(grid: Job) -> str:
    _, manifest = yaml.safe_load_all(LAUNCHER.render(grid)["rayjob.yaml"])
    RayJobManifest.model_validate(manifest)
    return str(manifest["metadata"]["name"])


@pytest.mark.slow  # kubectl looks up all kinds of objects before a call: 25 s and more
@needs_kubectl
def test_a_job_is_judged_created_asked_and_replaced(api: Api, tmp_path: Path) -> None:
    grid = made(tmp_path)
    LAUNCHER.check(grid)
    assert api.objects == {}, "only judged"
    assert [query["dryRun"] for method, _, query in api.asked if method == "POST"] == [["All"], ["All"]]
    launch = launched(grid)
    assert (launch.job_id, launch.address) == ("grid", "peft")
    assert sorted(path.rsplit("/", 2)[-2] for path in api.objects) == ["configmaps", "rayjobs"]
    assert LAUNCHER.state(launch) == "Initializing"
    api.set_state("grid", "Running")
    assert LAUNCHER.state(launch) == "Running"
    assert goes_on("Running")
    api.set_state("grid", "Failed")  # by `harness stop`, for example
    assert not goes_on(LAUNCHER.state(launch))
    api.asked.clear()
    launched(grid)
    assert "DELETE" in [method for method, _, _ in api.asked], "applied again, it would not run again"
    assert LAUNCHER.state(launch) == "Initializing"
    api.objects.clear()
    assert LAUNCHER.state(launch) == "ended"


@pytest.mark.slow  # kubectl looks up all kinds of objects before a call: 25 s and more
@needs_kubectl
def test_the_logs_are_those_of_the_pod_that_submits(api: Api, tmp_path: Path) -> None:
    api.log = "6 trials to run\n"
    command = LAUNCHER.log_command(launched(made(tmp_path)), follow=False)
    assert command is not None
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "6 trials to run\n"


@pytest.mark.slow  # kubectl looks up all kinds of objects before a call: 25 s and more
@needs_kubectl
def test_what_kubernetes_refuses_is_told_in_its_words_before_anything_is_made(api: Api, tmp_path: Path) -> None:
    api.judge = lambda _: "spec.rayClusterSpec.authOptions: unknown field"
    with pytest.raises(UserError, match=r'RayJob\.ray\.io "grid" is invalid: spec\.rayClusterSpec\.authOptions: unkn'):
        LAUNCHER.check(made(tmp_path))
    with pytest.raises(UserError, match=r'namespaces "mine" not found'):
        LAUNCHER.check(job(tmp_path, written_profile(tmp_path, PROFILE.format(storage="s3://b/r", more="").replace(
            "namespace: peft", "namespace: mine")), output="s3://b/r"))  # fmt: skip
    api.operator = False
    shutil.rmtree(tmp_path / "kubectl")  # kubectl remembers for ten minutes what there is
    with pytest.raises(UserError, match=r'resource type "rayjob"; is the KubeRay operator installed there\?'):
        LAUNCHER.check(made(tmp_path))
    assert api.objects == {}


@pytest.mark.slow  # kubectl looks up all kinds of objects before a call: 25 s and more
@needs_kubectl
def test_a_job_of_the_same_name_of_somebody_else_is_left_alone(api: Api, tmp_path: Path) -> None:
    for folder in (tmp_path / "me", tmp_path / "you"):
        folder.mkdir()
    launched(made(tmp_path / "you"))
    api.set_state("grid", "Complete")
    with pytest.raises(
        UserError, match=r"namespace peft: it has a RayJob grid \(Complete\) that was not launched from"
    ):
        LAUNCHER.check(made(tmp_path / "me"))


@pytest.mark.slow  # kubectl looks up all kinds of objects before a call: 25 s and more
@needs_kubectl
def test_a_kubernetes_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with api_server(Api(), tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))
    with pytest.raises(UserError, match=r"kubectl .*get rayjob grid .* was refused"):
        LAUNCHER.check(made(tmp_path))


def test_a_driver_gets_sigterm_in_its_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {
        "get rayjob grid -o jsonpath={.status.rayClusterName}": "grid-x7",
        "get pods --selector=ray.io/cluster=grid-x7,ray.io/node-type=head": "pod/grid-x7-head\n",
        "exec pod/grid-x7-head -- python -c import psutil; ": "",
    }

    def call(command: Sequence[str], timeout_s: float = 0) -> str:
        assert list(command[:3]) == ["kubectl", "--namespace", "peft"]
        words = " ".join(command[3:])
        return next(answer for beginning, answer in answers.items() if words.startswith(beginning))

    monkeypatch.setattr(kuberay, "call", call)
    launch = Launch(kind="kuberay", profile="mine", job_id="grid", host="h", submitted_at="", address="peft")
    assert LAUNCHER.stop(launch) == "the driver in pod/grid-x7-head got SIGTERM"
    answers["get pods --selector=ray.io/cluster=grid-x7,ray.io/node-type=head"] = ""
    with pytest.raises(UserError, match="rayjob grid: it has no head now, so nothing runs"):
        LAUNCHER.stop(launch)


@pytest.mark.parametrize(
    ("storage", "more", "top", "says"),
    [
        ("/elsewhere/runs", ", volume_claim: data", "", r"storage: found '/elsewhere/runs'; .*mount_path \(/shared\)"),
        ("/shared/runs", "", "", r"storage: found '/shared/runs'; .* with a volume_claim"),
        ("s3://bucket/runs", "", "secrets: [HF_TOKEN]\n", r"kuberay\.secret: secrets needs the name of a Secret"),
    ],
)
def test_what_the_pods_could_not_reach_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, storage: str, more: str, top: str, says: str
) -> None:
    monkeypatch.setattr(kuberay, "check_program", lambda *_: None)
    grid = made(tmp_path, storage, more, top)
    with pytest.raises(UserError, match=says):  # noqa: PT012
        LAUNCHER.render(grid)
        LAUNCHER.check(grid)


def test_plugins_keep_their_paths(tmp_path: Path) -> None:
    files = tuple(tmp_path / name for name in ("a/mine.py", "b/mine.py", "b/zwei Wörter.py"))
    for number, path in enumerate(files):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"x = {number}\n")
    config, manifest = yaml.safe_load_all(LAUNCHER.render(replace(made(tmp_path), plugins=files))["rayjob.yaml"])
    RayJobManifest.model_validate(manifest)
    pod = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mounted,) = (volume["configMap"] for volume in pod["volumes"] if "configMap" in volume)
    found = {item["path"]: config["data"][item["key"]] for item in mounted["items"]}
    assert mounted["name"] == config["metadata"]["name"]
    assert set(found) == {"profile.yaml", "grid.yaml", "a/mine.py", "b/mine.py", "b/zwei Wörter.py"}
    assert [found[path] for path in ("a/mine.py", "b/mine.py", "b/zwei Wörter.py")] == ["x = 0\n", "x = 1\n", "x = 2\n"]


@pytest.mark.parametrize(
    ("plugin", "content", "says"),
    [
        (
            "../mine.py",
            b"",
            r"mine\.py: a job of kind kuberay brings plugins from the folder of the experiment only \(",
        ),
        ("profile.yaml", b"", r"profile\.yaml: the profile of the job is called profile\.yaml; rename this file"),
        ("mine.py", b"\xff", r"mine\.py: not a text file in UTF-8, which a ConfigMap could bring: "),
        ("mine.py", b"#" * 1_000_000, r"grid\.yaml: 1,000,\d+ bytes with its plugins; a ConfigMap may have 1,000,000"),
    ],
)
def test_what_a_config_map_cannot_bring_is_refused(plugin: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    grid = made(tmp_path / "in")
    (tmp_path / "in" / plugin).write_bytes(content)
    with pytest.raises(UserError, match=says):
        LAUNCHER.render(replace(grid, plugins=(tmp_path / "in" / plugin,)))
