"""The lease of a run folder, at a URL or on a file system: one holder at a time."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from harness.core import lease as module
from harness.core.errors import SweepEndedError
from harness.core.lease import Lease, Place, holder_of, leased
from harness.core.process import this_process
from harness.core.shared_folder import SharedFolder
from harness.core.storage import Folder, StorageError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    monkeypatch.setattr(module, "DEAD_S", 0.4)


@pytest.fixture(params=["URL", "folder"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return Folder(f"file://{tmp_path}/there") if request.param == "URL" else SharedFolder(tmp_path)


def test_one_holds_it_and_the_next_gets_it_when_it_ends(folder: Place, tmp_path: Path) -> None:
    notes: list[str] = []
    with leased(folder, tmp_path / "a", notes.append):
        assert "process" in (holder_of(folder) or "")
        with (
            pytest.raises(StorageError, match=r"in use by another sweep or profile \(process \d+ on .*run --fresh"),
            leased(folder, tmp_path / "b", notes.append),
        ):
            pass
    assert holder_of(folder) is None
    with leased(folder, tmp_path / "b", notes.append):
        pass
    assert notes == [], "a process of this machine is known to be alive: nobody waits"
    assert list(folder.files(".lease")) == [".lease/000002.json"]


def test_a_holder_looks_for_requests_whenever_it_renews(folder: Place, tmp_path: Path) -> None:
    """What `harness stop URL` writes reaches the driver so."""
    looked = threading.Event()
    with leased(folder, tmp_path / "a", lambda _: None, looked.set):
        assert looked.wait(10)


def test_a_dead_holder_is_followed_after_a_while(folder: Place, tmp_path: Path) -> None:
    folder.create(".lease/000001.json", b'{"owner": "x", "holder": "process 1 on gone", "beat": 3}')
    notes: list[str] = []
    with leased(folder, tmp_path / "a", notes.append):
        assert list(folder.files(".lease")) == [".lease/000002.json"]
    assert notes == [f"{folder.url}: in use by process 1 on gone; waiting up to 0.4 s to see whether it is alive"]


def test_a_holder_on_another_machine_is_alive_while_its_file_changes(folder: Place) -> None:
    elsewhere = {**this_process(), "machine": "another"}
    content = {"owner": "x", "holder": "process 9 on another", "process": elsewhere}
    folder.create(".lease/000001.json", json.dumps(content | {"beat": 1}).encode())
    renew = threading.Timer(0.15, folder.write, (".lease/000001.json", json.dumps(content | {"beat": 2}).encode()))
    renew.start()
    notes: list[str] = []
    with pytest.raises(StorageError, match="process 9 on another"), leased(folder, None, notes.append):
        pass
    assert len(notes) == 1
    renew.join()


def test_a_dead_holder_on_this_machine_is_followed_at_once(folder: Place) -> None:
    mine = this_process()
    dead = {"owner": "x", "holder": "killed", "process": {**mine, "started": mine["started"] - 60}}
    folder.create(".lease/000003.json", json.dumps({**dead, "renewed_at": time.time()}).encode())
    assert holder_of(folder) is None
    notes: list[str] = []
    with leased(folder, None, notes.append):
        assert list(folder.files(".lease")) == [".lease/000004.json"]
    assert notes == []


def test_a_dead_holder_of_the_same_copy_is_followed_at_once(folder: Place, tmp_path: Path) -> None:
    notes: list[str] = []
    owner = module._owner_of(tmp_path / "a")
    folder.create(".lease/000004.json", json.dumps({"owner": owner, "holder": "killed"}).encode())
    with leased(folder, tmp_path / "a", notes.append):
        pass
    assert notes == []


def test_of_many_contenders_one_gets_it(folder: Place, tmp_path: Path) -> None:
    folder.create(".lease/000001.json", b'{"owner": "x", "holder": "gone", "beat": 3}')
    held, refused = [], []
    all_in, leave = threading.Barrier(4), threading.Event()

    def contend(number: int) -> None:
        all_in.wait()
        try:
            with leased(folder, tmp_path / str(number), lambda _: None):
                held.append(number)
                leave.wait(10)
        except StorageError:
            refused.append(number)
        if len(refused) == 3:
            leave.set()

    threads = [threading.Thread(target=contend, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert len(refused) == 3


def test_a_holder_that_was_taken_over_is_told(folder: Place) -> None:
    folder.create(".lease/000001.json", b"{}")
    mine = Lease(folder, 1, "me")
    mine.check()
    folder.create(".lease/000002.json", b"{}")
    mine.renew_until_ended()
    with pytest.raises(SweepEndedError, match=r"another harness has taken over this run folder"):
        mine.check()
    mine.end()
    assert folder.read(".lease/000002.json") == b"{}"
