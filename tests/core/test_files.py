"""Atomic writes: a file is complete or absent."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.core.files import DiskFullError, atomic, digest_of, remove_abandoned, write_atomically


def test_a_block_that_fails_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, "old")
    with pytest.raises(TypeError, match="data must be str"), atomic(path) as partial:
        partial.write_text(partial.write_text("half"))  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="partial"), atomic(path):
        pass  # nothing was written
    assert path.read_text() == "old"


def test_several_writers_of_one_file_do_not_interfere(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_atomically(path, f"{n}" * 10_000), range(10)))
    assert path.read_text() in {f"{n}" * 10_000 for n in range(10)}
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_is_the_sha_256_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content" * 400_000)
    assert digest_of(tmp_path / "file") == hashlib.sha256(b"content" * 400_000).hexdigest()


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: IO error: No space left on device (os error 28)"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    ],
    ids=["full", "quota", "safetensors", "pyarrow"],
)
def test_a_full_disk_is_one_error_and_leaves_the_old_file(tmp_path: Path, raised: Exception) -> None:
    path = tmp_path / "report" / "index.html"
    write_atomically(path, "old")

    def write() -> None:
        with atomic(path) as partial:
            partial.write_text("half", encoding="utf-8")
            raise raised

    with pytest.raises(DiskFullError, match=rf"^{path}: could not be written: the disk is full; free some space"):
        write()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(path.parent.iterdir()) == [path]


def test_another_error_is_not_said_to_be_a_full_disk(tmp_path: Path) -> None:
    for raised in (ValueError("not a number"), PermissionError(errno.EACCES, "no"), RuntimeError("unexpected pos 3")):
        with pytest.raises(type(raised), match=r"no|pos") as caught, atomic(tmp_path / "a"):
            raise raised
        assert caught.value is raised


def test_what_killed_writers_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".a.json.1f.partial", ".b.json.2f.partial", "a.json"))
    for path in (old, new, other):
        path.write_text("x", encoding="utf-8")
    for path in (old, other):
        os.utime(path, (0, 0))
    remove_abandoned(tmp_path)
    remove_abandoned(tmp_path / "nowhere")
    assert sorted(tmp_path.iterdir()) == [new, other]
