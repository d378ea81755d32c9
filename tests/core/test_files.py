"""Atomic writes: a file is complete or absent."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.core.files import atomic, digest_of, write_atomically


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
