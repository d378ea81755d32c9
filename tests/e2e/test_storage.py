"""A run folder in S3: an imitation of it on loopback, real trials, and machines that share nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.core.storage import Folder, StorageError
from tests.support.ray_nodes import ray_nodes

pytest.importorskip("s3fs", reason="needs the extra s3")
server = pytest.importorskip("moto.server", reason="needs moto")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

EXPERIMENT = """
name: small
task: {name: scenes, train_examples: 32, validation_examples: 8, test_examples: 8}
adapters: [{method: lora, rank: 4, grouping: [agnostic, specific], learning_rate: 6e-3}]
budget: {examples: 24, epochs: 2}
optimizer: {per_device_train_batch_size: 8}
eval: {max_new_tokens: 8}
resources: {profile: false, checkpoint_interval_s: 0, max_concurrent_trials: 1}
"""
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "very-secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Machine:
    """A computer with a cache of its own."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "small.yaml").write_text(EXPERIMENT, encoding="utf-8")
        self.environment = {
            **os.environ, **KEYS, "AWS_ENDPOINT_URL": endpoint, "HARNESS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "harness", *arguments], cwd=self.folder, env={**self.environment, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def call(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=500)
        return process.returncode, said


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        url = "http://{}:{}".format(*moto.get_host_and_port())
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        Folder("s3://bucket/x")._fs.mkdir("bucket")
        yield url
        moto.stop()


def test_what_s3_answers(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder("s3://bucket/answers")
    assert folder.files() == {}
    assert folder.folders() == []
    assert folder.read("a/b") is None
    assert folder.create("a/b", b"1")
    assert not folder.create("a/b", b"2"), "of two one wins"
    assert folder.read("a/b") == b"1"
    before = folder.files()
    folder.write("a/b", b"3")
    assert list(folder.files()) == ["a/b"]
    assert folder.files() != before
    assert folder.files("a") == folder.files()
    assert folder.folders() == ["a"]
    folder.remove(["a/b", "never there"])
    assert folder.files() == {}
    with pytest.raises(StorageError, match=r"^s3://absent/runs: no such bucket; create it first$"):
        Folder("s3://absent/runs").files()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"^s3://bucket/runs: could not be listed: EndpointConnectionError") as found:
        Folder("s3://bucket/runs").files()
    assert time.monotonic() - began < 30
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(StorageError, match=r"check the credentials: AWS_ACCESS_KEY_ID"):
        Folder("s3://bucket/runs").files()
    assert "very-secret" not in str(found.value)


def test_a_run_in_s3_is_seen_and_gone_on_with_from_another_machine(tmp_path: Path, endpoint: str) -> None:
    one, other = Machine(tmp_path / "one", endpoint), Machine(tmp_path / "other", endpoint)
    code, said = one.call("run", "small.yaml", "--output", "s3://bucket/runs")
    assert code == 0, said
    assert "stored:  s3://bucket/runs/small" in said
    files = set(Folder("s3://bucket/runs/small").files())
    assert {"plan.json", "experiment.yaml", "report/index.html"} <= files
    assert sum(name.endswith(("record.json", "examples.parquet", "best.safetensors")) for name in files) == 6
    assert not [name for name in files if "checkpoint" in name or ".seen" in name or name.startswith("ray/")]
    assert not list((one.folder / "cache/storage/trials").rglob("record.json")), "what is stored is not kept twice"
    assert not [path for path in one.folder.rglob("*") if path.is_file() and b"very-secret" in path.read_bytes()]

    code, said = other.call("status", "s3:/bucket/runs/small")
    assert code == 0, said
    assert "s3://bucket/runs/small: small" in said
    assert "2 of 2 trials finished" in said
    assert other.call("leaderboard", "show", "s3://bucket/runs/small", "--format", "csv")[0] == 0
    code, said = other.call("run", "small.yaml", "--output", "s3://bucket/runs")
    assert code == 0, said
    assert "all 2 trials have already finished" in said


def test_two_drivers_do_not_run_in_one_folder(tmp_path: Path, endpoint: str) -> None:
    one, other = Machine(tmp_path / "one", endpoint), Machine(tmp_path / "other", endpoint)
    first = one.start("run", "small.yaml", "--output", "s3://bucket/two")
    there = Folder("s3://bucket/two/small")
    while "plan.json" not in there.files():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.5)
    code, said = other.call("run", "small.yaml", "--output", "s3://bucket/two")
    assert code == 2, said
    assert "s3://bucket/two/small: in use by another sweep or profile (process" in said
    said, _ = first.communicate(timeout=500)
    assert first.returncode == 0, said


def test_a_trial_goes_on_from_its_checkpoint_on_another_machine(tmp_path: Path, endpoint: str) -> None:
    """The driver and its worker are killed once there is a checkpoint; another machine has nothing but the storage."""
    one, other = Machine(tmp_path / "one", endpoint), Machine(tmp_path / "other", endpoint)
    for machine in (one, other):
        text = EXPERIMENT.replace("epochs: 2", "epochs: 20").replace("[agnostic, specific]", "specific")
        (machine.folder / "small.yaml").write_text(text, encoding="utf-8")
    first = one.start("run", "small.yaml", "--output", "s3://bucket/moved")
    there = Folder("s3://bucket/moved/small")
    while not any(name.endswith("checkpoint/state.json") for name in there.files()):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.2)
    first.kill()
    first.wait()
    code, said = other.call("run", "small.yaml", "--output", "s3://bucket/moved")
    assert code == 0, said
    (log,) = (name for name in there.files() if name.endswith("log.txt"))
    text = (there.read(log) or b"").decode()
    assert "resumed after epoch" in text
    (record,) = (name for name in there.files() if name.endswith("record.json"))
    assert len(json.loads(there.read(record) or b"")["history"]) == 20


def test_nodes_that_share_nothing_but_the_storage(tmp_path: Path, endpoint: str) -> None:
    """Each of two nodes has a cache of its own; the driver is on neither."""
    if os.geteuid() != 0:
        pytest.skip("a node that does not see a folder needs root (unshare)")
    one = Machine(tmp_path / "one", endpoint)
    with ray_nodes([0]) as nodes:
        nodes.environment |= {"HARNESS_CACHE": str(tmp_path / "node")}
        nodes.join([one.folder])
        text = f"kind: ray\naddress: {nodes.address}\nstorage: s3://bucket/nodes\n"
        (one.folder / "nodes.yaml").write_text(text, encoding="utf-8")
        driver = one.start("run", "small.yaml", "--profile", "nodes.yaml", RAY_TMPDIR=nodes.environment["RAY_TMPDIR"])
        said, _ = driver.communicate(timeout=300)
        assert driver.returncode == 2, said
        assert "mlflow.db: No such file or directory" in said, "SQLite of the driver: told before any trial"
        text = EXPERIMENT + f"tracking: {{mlflow_uri: 'sqlite:///{tmp_path}/shared.db'}}\n"
        (one.folder / "small.yaml").write_text(text, encoding="utf-8")
        driver = one.start("run", "small.yaml", "--profile", "nodes.yaml", RAY_TMPDIR=nodes.environment["RAY_TMPDIR"])
        said, _ = driver.communicate(timeout=500)
    assert driver.returncode == 0, said
    assert "stored:  s3://bucket/nodes/small" in said
