"""What a run shows to others: the ports that it listens on, and where its secrets can be read."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from clusters.launch.ray_node import free_ports, own_ip
from tests.support.ray_nodes import ray_nodes
from tests.support.watched import Watched, files_with, watch

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

EXPERIMENT = """
name: small
task: {{name: scenes, train_examples: 32, validation_examples: 8, test_examples: 8}}
adapters: [{{method: lora, rank: 4, grouping: [agnostic, specific], learning_rate: 6e-3}}]
budget: {{examples: 24, epochs: 1}}
optimizer: {{per_device_train_batch_size: 8}}
eval: {{max_new_tokens: 4}}
resources: {{profile: false, checkpoint_interval_s: 0, max_concurrent_trials: 1, workers: {workers}}}
"""
WORD = "sentinel7f3a9c"  # part of every secret below, and of nothing else
SECRETS = (
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)  # fmt: skip


@dataclass(frozen=True)
class Exposed:
    """A run with secrets in its environment, and the folders that it and what it started wrote to."""

    seen: Watched
    folder: Path
    temporary: Path  # the folder for temporary files
    kept: Path  # what was in it during the run


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """HOST:PORT of an MLflow server, and its folder."""
    folder = tmp_path_factory.mktemp("server")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, stdout=log, stderr=log
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"127.0.0.1:{port}", folder
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(120):
        assert process.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError("the server did not start in time")


@pytest.fixture(scope="module", params=[1, 2], ids=["one-process", "two-workers"])
def exposed(
    request: pytest.FixtureRequest, server: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exposed]:
    """The first takes the address of the server from its environment, the second from its experiment."""
    folder, experiment = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("experiment") / "small.yaml"
    uri = f"http://user:{WORD}-uri@{server[0]}"
    text = EXPERIMENT.format(workers=request.param)
    experiment.write_text(
        text if request.param == 1 else f"{text}tracking: {{mlflow_uri: '{uri}'}}\n", encoding="utf-8"
    )
    temporary, kept = (Path(tempfile.mkdtemp(dir="/tmp")) for _ in range(2))  # Ray's sockets need a short path
    environment = (
        secrets() | {"RAY_TMPDIR": str(temporary)} | ({"MLFLOW_TRACKING_URI": uri} if request.param == 1 else {})
    )
    command = [sys.executable, "-m", "harness", "run", str(experiment)]
    try:
        seen = watch(_named_by_its_address(command, folder), folder, environment, keep=(temporary, kept))
        assert seen.exit_code == 0, seen.output
        yield Exposed(seen, folder, temporary, kept)
    finally:
        shutil.rmtree(temporary)
        shutil.rmtree(kept)


def secrets() -> dict[str, str]:
    return {name: f"{WORD}-{name}" for name in SECRETS}


def _named_by_its_address(command: list[str], folder: Path) -> list[str]:
    """The command on a machine whose name is that of its address in the network, as on most servers; needs root."""
    if os.geteuid() != 0:
        return command
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{own_ip()} {socket.gethostname()}\n", encoding="utf-8")
    return ["unshare", "-m", "sh", "-c", f"mount --bind '{hosts}' /etc/hosts && exec \"$@\"", "sh", *command]


def test_what_listens_is_seen(tmp_path: Path) -> None:
    code = "import socket, time; s = socket.create_server(('0.0.0.0', 0)); time.sleep(2)"
    assert {address for address, _ in watch([sys.executable, "-c", code], tmp_path, {}).reachable()} == {"0.0.0.0"}


def test_a_run_listens_on_loopback_alone(exposed: Exposed) -> None:
    names = {name for _, name in exposed.seen.listening}
    assert {"gcs_server", "raylet"} <= names, "Ray was looked at"
    assert exposed.seen.reachable() == set()


def test_nobody_else_can_enter_the_folder_of_ray_which_is_removed(exposed: Exposed) -> None:
    (private,) = exposed.kept.iterdir()
    assert list(private.rglob("gcs_server*.out")), "it was Ray's"
    assert exposed.seen.modes == {0o700}
    assert list(exposed.temporary.iterdir()) == []


def test_no_secret_is_in_a_file_a_log_or_a_command_line(exposed: Exposed, server: tuple[str, Path]) -> None:
    assert files_with(WORD, [exposed.folder, exposed.kept, server[1]]) == []
    assert [line for line in exposed.seen.command_lines if WORD in line] == []
    (token,) = exposed.seen.tokens
    assert len(token) == 64, "Ray has a token of this run"
    assert files_with(token, [exposed.folder, exposed.kept, server[1]]) == []
    assert [line for line in exposed.seen.command_lines if token in line] == []
    assert any("raylet" in line for line in exposed.seen.command_lines), "Ray's processes were looked at"


def test_the_run_was_logged_with_its_secret(exposed: Exposed, server: tuple[str, Path]) -> None:
    """Otherwise the tests above would look for what was never used."""
    with closing(sqlite3.connect(server[1] / "mlflow.db")) as database:
        (runs,) = database.execute("SELECT COUNT(*) FROM tags WHERE key = 'harness.trial_id'").fetchone()
    assert runs >= 2
    assert "user:***@" in exposed.seen.output


def test_a_cluster_that_others_started_keeps_no_secret(server: tuple[str, Path], tmp_path: Path) -> None:
    """Its nodes lack the variables: they travel with the trials."""
    (tmp_path / "small.yaml").write_text(EXPERIMENT.format(workers=1), encoding="utf-8")
    with ray_nodes([1]) as nodes:
        text = f"kind: ray\naddress: {nodes.address}\nsecrets: [MY_PASSWORD]\n"
        (tmp_path / "nodes.yaml").write_text(text, encoding="utf-8")
        ray = Path(nodes.environment["RAY_TMPDIR"])
        environment = secrets() | {"MY_PASSWORD": f"{WORD}-mine", "RAY_TMPDIR": str(ray)}
        environment |= {"MLFLOW_TRACKING_URI": f"http://user:{WORD}-uri@{server[0]}"}
        command = [sys.executable, "-m", "harness", "run", "small.yaml", "--profile", "nodes.yaml"]
        seen = watch(command, tmp_path, environment)
        assert seen.exit_code == 0, seen.output
        assert list(ray.rglob("worker-*.out")), "it is where Ray's logs are"
        assert files_with(WORD, [tmp_path, ray, server[1]]) == []
    assert list(tmp_path.glob("runs/small/ray/tune/tuner.pkl")), "what Tune keeps was looked at"
    assert [line for line in seen.command_lines if WORD in line] == []
