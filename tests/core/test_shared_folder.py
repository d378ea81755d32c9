"""Small files of a folder that machines share."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from harness.core.shared_folder import SharedFolder
from harness.core.storage import StorageError


def test_files_are_made_once_written_in_their_place_and_removed(tmp_path: Path) -> None:
    folder = SharedFolder(tmp_path)
    assert folder.files("a") == {}
    assert folder.read("a/1.json") is None
    assert folder.create("a/1.json", b"first")
    assert not folder.create("a/1.json", b"second")
    inode = (tmp_path / "a" / "1.json").stat().st_ino
    folder.write("a/1.json", b"third")
    assert folder.read("a/1.json") == b"third"
    assert (tmp_path / "a" / "1.json").stat().st_ino == inode
    assert list(folder.files("a")) == ["a/1.json"]
    folder.remove(["a/1.json", "a/2.json"])
    assert folder.files("a") == {}
    with pytest.raises(StorageError, match=r"a/1\.json: could not be written: No such file"):
        folder.write("a/1.json", b"late")


@pytest.mark.parametrize("links", [True, False])
def test_of_many_who_make_a_file_one_does(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(*_: object, **__: object) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    won, all_in = [], threading.Barrier(8)

    def make(number: int) -> None:
        all_in.wait()
        if SharedFolder(tmp_path).create("a/1.json", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=make, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "a" / "1.json").read_bytes().strip() == str(won[0]).encode()
    assert len(list((tmp_path / "a").iterdir())) == 1
