"""Addresses of Ray clusters that cannot be used, and what travels to the workers; tests/e2e has clusters."""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clusters.profiles import LOCAL, Profile
from harness.core import registry
from harness.core.errors import UserError
from harness.core.registry import Plugin, plugin_file, shipped_place
from harness.sweep import cluster
from harness.sweep.nodes import PACKAGES, Node, check_nodes, own_code
from harness.sweep.ship import collect, packages_of


def answer(**changes: Any) -> dict[str, Any]:
    same = {"python": "3.11.7", "versions": {"torch": "2.13.0"}, "code": own_code(), "missing": [], "unreadable": {}}
    return {**same, **changes}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"^address '127\.0\.0\.1:1': no Ray cluster answers there; start it, or give"),
        ("nowhere", r"^address 'nowhere': allowed: auto, or HOST:PORT, such as 10\.0\.0\.1:6379"),
        ("ray://127.0.0.1:10001", r"^address 'ray://127\.0\.0\.1:10001': a sweep needs a driver inside the cluster"),
    ],
)
def test_an_address_that_cannot_be_used(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster._init(address, {})


def test_a_host_that_does_not_answer_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def silent(_: object, timeout: float) -> None:
        asked.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no Ray cluster answers there"):
        cluster._init("10.255.255.1:6379", {})
    assert asked == [5.0]
    assert time.monotonic() - began < 5


def test_variables_travel_by_name_to_other_machines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in cluster.FORWARDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("MY_TOKEN", "t")
    monkeypatch.setenv("OTHER", "o")
    profile = Profile(kind="ray", address="auto", secrets=("MY_TOKEN", "NOT_SET"), env={"NCCL_DEBUG": "INFO"})
    expected = {"AWS_SECRET_ACCESS_KEY": "s", "MY_TOKEN": "t", "NCCL_DEBUG": "INFO"}
    assert cluster.environment(profile) == expected
    assert cluster.environment(LOCAL) == {}


def test_nodes_that_cannot_run_the_trials_are_all_named() -> None:
    nodes = [
        Node("10.0.0.1", answer()),
        Node("10.0.0.2 (two)", answer(unreadable={"/data/run/.seen": "No such file or directory", "/coco": "denied"})),
        Node("10.0.0.3", answer(missing=["my_tasks"], code=own_code())),
        Node("10.0.0.4", {"problem": "no answer in 120 s"}),
        Node("10.0.0.5", answer(versions={"torch": None})),
    ]
    with pytest.raises(UserError, match=r"^5 problems:") as found:
        check_nodes(nodes, Path("/data/run"), shipped=False)
    assert str(found.value).splitlines()[1:] == [
        "node 10.0.0.2 (two): cannot read the run folder /data/run: No such file or directory; put the run folder on a "
        "file system that all nodes share, or at a URL (--output s3://…)",
        "node 10.0.0.2 (two): cannot read /coco: denied",
        "node 10.0.0.3: Python packages not found: my_tasks; install them there, or set ship_code: true in the profile",
        "node 10.0.0.4: no answer in 120 s",
        "node 10.0.0.5: torch is not installed",
    ]


def test_other_versions_are_told() -> None:
    nodes = [
        Node("10.0.0.1", answer()),
        Node("10.0.0.2", answer(python="3.12.1", versions={"torch": "2.12.0"}, code="another")),
    ]
    versions = [
        "node 10.0.0.2: python 3.12.1, but 3.11.7 on 10.0.0.1",
        "node 10.0.0.2: torch 2.12.0, but 2.13.0 on 10.0.0.1",
    ]
    assert check_nodes(nodes, Path("/run"), shipped=True) == versions
    code = "node 10.0.0.2: another version of the harness than here"
    assert check_nodes(nodes, Path("/run"), shipped=False) == [*versions, code]


def test_a_plugin_file_is_sent_with_modules_and_data_beside_it_and_found_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = tmp_path / "mine/metric.py"
    source.parent.mkdir()
    (source.parent / "words.txt").write_text("a b", encoding="utf-8")
    (source.parent / "words_of").mkdir()
    (source.parent / "words_of/table.py").touch()
    source.write_text(
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent))\nimport words_of.table\n"
        "from harness import Metric\nclass Words(Metric):\n    labels = {'w': 'W'}\n"
        "    @classmethod\n    def files(cls):\n        return (Path(__file__).with_name('words.txt'),)\n"
        "    def score(self, predictions, references):\n        raise NotImplementedError\n",
        encoding="utf-8",
    )
    plugin = Plugin(name="words", distribution="metric.py", result_version="x", target=f"{source}:Words")
    package = Plugin(name="lora", distribution="d", result_version=1, target="adapters.methods.lora:LoRA")
    sent = tmp_path / "sent"
    sent.mkdir()
    collect([plugin, package], sent)
    assert packages_of([plugin, package]) == list(PACKAGES)
    assert {path.name for path in sent.iterdir()} == {*PACKAGES, "shipped_plugins"}
    assert (sent / "harness/pretrained").is_dir()
    assert not list(sent.rglob("__pycache__"))
    assert (sent / shipped_place(source)).with_name("words.txt").read_text() == "a b"
    assert (sent / shipped_place(source)).parent.joinpath("words_of/table.py").is_file()
    assert plugin_file(source) == source
    shutil.rmtree(source.parent)
    for name in [name for name in sys.modules if name.startswith(("harness_plugin_", "words_of"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(registry, "__file__", str(sent / "harness/core/registry.py"))
    assert plugin_file(source) == sent / shipped_place(source)
    (loaded,) = registry.import_target(plugin.target, "metric").files()
    assert loaded.read_text() == "a b", "the copy knows its own data"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_death_of_the_head_ends_the_process_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself waits for its head for a minute, deaf to exceptions."""
    server = socket.create_server(("127.0.0.1", 0))
    address = "{}:{}".format(*server.getsockname())
    said: list[str] = []
    ended: list[int] = []
    over: Callable[[], bool] = lambda: bool(ended)  # noqa: E731

    def leave(code: int) -> None:
        ended.append(code)
        raise SystemExit

    monkeypatch.setattr(cluster, "_WATCH_S", 0.02)
    monkeypatch.setattr(cluster.os, "_exit", leave)
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: type("Context", (), {"gcs_address": address}))
    with cluster._watched_head(said.append):
        time.sleep(0.2)
        assert not over()
        server.close()
        deadline = time.monotonic() + 20
        while not over() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended == [1]
    assert said == [
        f"Ray's head node ({address}) has died; finished trials are kept; run the same experiment again to continue"
    ]
