"""The cache on disk: its cap, what is used, what is broken, and folders that cannot be written to."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.core.disk_cache import CacheFullError, DiskCache, Use
from harness.core.errors import UserError
from harness.core.files import DiskFullError

CHANGE = "set HARNESS_CACHE"


def cache_in(folder: Path, limit_bytes: int = 1000) -> DiskCache:
    return DiskCache(folder / "cache", limit_bytes, CHANGE)


def used_at(path: Path, seconds: int) -> None:
    os.utime(path, (seconds, seconds))


def test_files_are_found_by_what_they_are_for(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    assert cache.files("a/0") == []
    paths = [cache.add("a/0", b"one", ".bin"), cache.add("a/0", b"two", ".bin")]
    cache.add("a/1", b"three", ".bin"), cache.add("b/0", b"four", ".bin")
    assert sorted(cache.files("a/0")) == sorted(paths)
    assert sorted(path.read_bytes() for path in paths) == [b"one", b"two"]
    assert cache.size_bytes == len("onetwothreefour")


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    first, second, third = (cache.add(name, name.encode() * 300, ".bin") for name in "abc")
    for seconds, path in enumerate((first, second, third)):
        used_at(path, seconds)
    use = Use(cache)
    assert use.take(first)  # now the latest
    use.close()
    added = cache.add("d", b"d" * 300, ".bin")
    assert [path.exists() for path in (first, second, third, added)] == [True, False, True, True]


def test_what_a_running_process_uses_stays(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    first, second = cache.add("a", b"a" * 400, ".bin"), cache.add("b", b"b" * 400, ".bin")
    used_at(first, 1)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom harness.core.disk_cache import DiskCache, Use\n"
        "use = Use(DiskCache(Path(sys.argv[1]), 1000, ''))\nassert use.take(Path(sys.argv[2]))\n"
        "print('taken', flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(cache.folder), str(first)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        used_at(first, 1)
        cache.add("c", b"c" * 400, ".bin")
        assert first.exists()
        assert not second.exists()
        with pytest.raises(CacheFullError, match=r"running trials use takes all of its .* GiB; set HARNESS_CACHE"):
            cache.add("d", b"d" * 700, ".bin")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    used_at(first, 1)
    cache.add("d", b"d" * 600, ".bin")  # whose user is dead is free
    assert not first.exists()
    assert cache.size_bytes == 1000


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "link", "folder"])
def test_a_file_that_is_not_what_was_written_is_not_used(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_in(tmp_path)
    path, content = cache.add("a", b"content", ".bin"), bytearray(b"content")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"content")
    if harm == "flip":
        content[3] ^= 1
        path.write_bytes(content)
    elif harm in {"truncate", "empty"}:
        os.truncate(path, 6 if harm == "truncate" else 0)
    else:
        path.unlink()
        path.symlink_to(elsewhere) if harm == "link" else path.mkdir()
    use = Use(cache)
    assert not use.take(path)
    assert path.name in caplog.text
    assert "it is removed and made again" in caplog.text
    assert harm == "folder" or (not path.is_symlink() and not path.exists())
    assert elsewhere.read_bytes() == b"content"


def test_a_user_that_is_collected_uses_nothing(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    path = cache.add("a", b"a" * 600, ".bin")
    use = Use(cache)
    use.take(path)
    del use
    cache.add("b", b"b" * 600, ".bin")
    assert not path.exists()


def test_what_killed_writers_left_goes(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    path = cache.add("a/0", b"whole", ".bin")
    left = path.with_name(".half.partial")
    left.write_bytes(b"ha")
    used_at(left, int(time.time()) - 7200)
    cache.add("a/1", b"next", ".bin")
    assert not left.exists()
    assert path.exists()


def test_too_little_room_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, 1 << 30)
    cache.check(1 << 20)
    with pytest.raises(UserError, match=r"about 2\.00 GiB are needed, and the cache may take 1\.00 GiB; set HARNESS"):
        cache.check(2 << 30)
    with pytest.raises(UserError, match=r"GiB are needed, and its disk has .* GiB free; free some, or set HARNESS_C"):
        DiskCache(tmp_path, 1 << 60, CHANGE).check(1 << 59)


def test_a_place_that_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache: cannot be written: File exists; set HARNESS_CACHE"):
        cache_in(tmp_path).check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written: Permission denied; set HARNESS_CACHE"):
        cache_in(tmp_path).check()


def test_a_file_system_that_is_read_only_is_told() -> None:
    with pytest.raises(UserError, match=r"/proc/features: cannot be written: .*; set HARNESS_CACHE"):
        DiskCache(Path("/proc/features"), 1000, CHANGE).check()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_full_disk_is_told_and_leaves_what_is_whole(small_disk: Path) -> None:
    cache = DiskCache(small_disk / "cache", 1 << 30, CHANGE)
    cache.check()
    whole = cache.add("a", b"a" * (2 << 20), ".bin")
    with pytest.raises(DiskFullError, match="the disk is full; free some space"):
        cache.add("b", b"b" * (2 << 20), ".bin")
    assert Use(cache).take(whole)
    assert [path.name for path in cache.folder.iterdir() if path.suffix] == [whole.name]
    (small_disk / "other").write_bytes(bytes(small_disk.stat().st_blksize * 190))
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; set HARNESS_CACHE"):
        cache.check()


def test_copies_of_a_process_use_files_each_for_itself(tmp_path: Path) -> None:
    """A profile's measuring processes are copies of one that has opened nothing yet."""
    cache = cache_in(tmp_path)
    path = cache.add("a", b"a", ".bin")
    use = Use(cache)
    copies = [copy.copy(use), copy.copy(use)]
    assert [one.take(path) for one in copies] == [True, True]
    assert len(list((tmp_path / "cache/.uses").iterdir())) == 2
