"""Folders at URLs: what is pulled and pushed, and what is refused. tests/sweep has S3 itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest

from harness.core import storage
from harness.core.storage import (
    Copy,
    Folder,
    StorageError,
    is_url,
    local_folder,
    normalised,
    push_copy,
    run_copy,
    url_of,
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/there/run"


def copy_at(url: str, here: Path) -> Copy:
    return Copy(Folder(url), here)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("s3://bucket/runs/", "s3://bucket/runs"),
        ("s3:/bucket/runs", "s3://bucket/runs"),
        ("S3://bucket/runs", "s3://bucket/runs"),
        ("gs://b/c", "gs://b/c"),
        ("file:///tmp/a", "file:///tmp/a"),
        ("memory://a/b", "memory://a/b"),
    ],
)
def test_a_url_has_one_spelling(place: str, expected: str) -> None:
    assert is_url(place)
    assert normalised(place) == expected


@pytest.mark.parametrize("place", ["runs", "/tmp/runs", "../runs", "a:b", "runs/s3://x", "c:/x"])
def test_a_path_is_no_url(place: str) -> None:
    assert not is_url(place)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s4://bucket/x", r"^s4://bucket/x: unknown scheme 's4'; allowed: file, gs, memory, s3; did you mean 's3'"),
        ("s3://", r"found no folder"),
        ("s3://bucket/../x", r"found no folder"),
        ("s3://key:secret@bucket/x", r"^s3://…@…: found a user name or a password in a URL; credentials are taken"),
    ],
)
def test_a_url_that_cannot_be_used(place: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as found:
        normalised(place)
    assert "secret" not in str(found.value)


def test_a_scheme_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(StorageError, match=r"^s3://b/c: s3:// needs another package; install it with pip .*\[s3\]"):
        Folder("s3://b/c")


def test_what_is_pushed_is_pulled_elsewhere(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    one, other = tmp_path / "one", tmp_path / "storage/other"
    (one / "trials/a").mkdir(parents=True)
    (one / "trials/a/record.json").write_text("{}")
    (one / "trials/a/best.safetensors").write_text("weights")
    (one / "ray").mkdir()
    (one / "ray/x").write_text("of this machine")
    (one / ".lock").touch()
    copy_at(url, one).push()
    assert sorted(Folder(url).files()) == ["trials/a/best.safetensors", "trials/a/record.json"]
    copy_at(url, other).pull()
    assert sorted(path.name for path in other.rglob("*") if path.is_file()) == [".storage.json", "record.json"]
    copy_at(url, other).pull(weights=True)
    assert (other / "trials/a/best.safetensors").read_text() == "weights"
    assert url_of(other) == url
    shutil.copytree(other, tmp_path / "elsewhere")
    assert url_of(tmp_path / "elsewhere") is None, "a run folder of somebody else's cannot say where it is pushed to"
    assert url_of(tmp_path) is None


def test_a_record_is_pushed_after_all_else(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record says that its trial is complete; a checkpoint's state that its files are."""
    pushed: list[str] = []
    monkeypatch.setattr(Folder, "put", lambda self, names, folder: pushed.extend(names))
    for name in ("record.json", "examples.parquet", "log.txt", "checkpoint/state.json", "checkpoint/epoch-1/weights"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(name)
    copy_at(url, tmp_path / "a").push()
    assert pushed[-2:] == ["checkpoint/state.json", "record.json"]
    assert set(pushed[:-2]) == {"examples.parquet", "log.txt", "checkpoint/epoch-1/weights"}


def test_only_what_has_changed_is_moved(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    for name in ("a.json", "b.json"):
        (one / name).write_text(name)
    copy_at(url, one).push()
    copy_at(url, other).pull()
    (one / "b.json").write_text("another")
    moved: list[str] = []
    put, get = Folder.put, Folder.get
    monkeypatch.setattr(Folder, "put", lambda s, names, f: (moved.extend(n := list(names)), put(s, n, f))[-1])
    monkeypatch.setattr(Folder, "get", lambda s, names, f: (moved.extend(n := list(names)), get(s, n, f))[-1])
    copy_at(url, one).push()
    assert moved == ["b.json"]
    copy_at(url, other).pull()
    assert moved == ["b.json", "b.json"]
    assert (other / "b.json").read_text() == "another"


def test_what_was_removed_there_is_removed_here_and_what_was_never_pushed_is_kept(url: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "pushed").write_text("1")
    copy_at(url, here).push()
    (here / "computed while the storage was away").write_text("2")
    Folder(url).remove(["pushed"])
    copy_at(url, here).pull()
    assert not (here / "pushed").exists()
    copy_at(url, here).push()
    assert list(Folder(url).files()) == ["computed while the storage was away"]


def test_a_trial_removes_there_what_it_removed_here(url: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    for name in ("checkpoint/epoch-1/weights", "log.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    copy = copy_at(url, here)
    copy.push(removed=True)
    (here / "checkpoint/epoch-1/weights").unlink()
    copy.push(removed=True)
    assert list(Folder(url).files()) == ["log.txt"]


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc/out", "a//b", "a\\b", "."])
def test_a_file_whose_name_leads_out_of_the_folder_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_at(f"file://{tmp_path}/there", tmp_path / "here")
    monkeypatch.setattr(Folder, "files", lambda self, below="": {name: "1"})
    with pytest.raises(StorageError, match=r"has a file .* whose name leads out of the folder"):
        copy.pull()
    assert not (tmp_path / "out").exists()


def test_a_connection_that_is_lost_is_tried_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    answers = iter([ConnectionError("reset"), TimeoutError(), None])

    def call() -> str:
        if error := next(answers):
            raise error
        return "done"

    assert Folder(url, patience_s=60.0).retried(call, "read") == "done"
    assert slept == [1.0, 2.0]
    answers = iter([ConnectionError("reset by peer")])
    with pytest.raises(StorageError, match=r"^file://.*: could not be read: ConnectionError: reset by peer$"):
        Folder(url).retried(call, "read")
    answers = iter([PermissionError("Forbidden")])
    with pytest.raises(StorageError, match=r"could not be read: PermissionError: Forbidden; check the credentials"):
        Folder(url, patience_s=60.0).retried(call, "read")


def test_a_push_that_fails_is_gone_on_with(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    for name in ("a", "b"):
        (tmp_path / "here" / name).write_text(name)
    put = Folder.put

    def broken(self: Folder, names: list[str], folder: Path) -> None:
        if names == ["b"]:
            raise StorageError("away")
        put(self, names, folder)

    monkeypatch.setattr(Folder, "put", broken)
    with pytest.raises(StorageError, match="away"):
        copy_at(url, tmp_path / "here").push()
    monkeypatch.setattr(Folder, "put", put)
    copy_at(url, tmp_path / "here").push()
    assert sorted(Folder(url).files()) == ["a", "b"]


def test_results_are_read_from_a_url(tmp_path: Path) -> None:
    """In the memory of this process: no file there."""
    run = run_copy("memory://results/small")
    run.here.mkdir(parents=True, exist_ok=True)
    (run.here / "plan.json").write_text("{}")
    run.push()
    assert local_folder("memory://results/small") == run.here
    with pytest.raises(StorageError, match=r"^memory://results/smal: no plan\.json there; .* did you mean 'small'"):
        local_folder("memory://results/smal")
    (run.here / "report.html").write_text("new")
    push_copy(run.here)
    push_copy(tmp_path)
    assert "report.html" in Folder("memory://results/small").files()
    assert local_folder(tmp_path) == tmp_path
