"""Features on disk: found again, shared by processes, and made again where they are broken."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core.disk_cache import CacheFullError, DiskCache
from harness.model import shelf as module
from harness.model.shelf import Shelf

NAME, WIDTH = "ab" * 16, 3
KEYS = [f"{n:x}".rjust(2, "0") * 16 for n in range(0, 256, 8)]  # in all buckets


def shelf_in(folder: Path, limit_bytes: int = 1 << 30, name: str = NAME, width: int = WIDTH) -> Shelf:
    return Shelf(DiskCache(folder, limit_bytes, "set HARNESS_CACHE"), name, width)


class Encoding:
    """Features that depend on the key; remembers for which it was asked."""

    def __init__(self, rows: int = 2) -> None:
        self.asked: list[str] = []
        self.rows = rows

    def __call__(self, key: str) -> list[Tensor]:
        self.asked.append(key)
        return [torch.full((self.rows + n, WIDTH), float(int(key[:4], 16) + n)) for n in range(2)]


def build(shelf: Shelf, encode: Encoding, keys: list[str] = KEYS) -> dict[str, list[Tensor]]:
    shelf.build({key: key for key in keys}, encode)
    found = {key: shelf.get(key) for key in keys}
    assert None not in found.values()
    return {key: value for key, value in found.items() if value is not None}


def check(found: dict[str, list[Tensor]], rows: int = 2) -> None:
    for key, tensors in found.items():
        for one, other in zip(tensors, Encoding(rows)(key), strict=True):
            assert torch.equal(one, other)


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    encode = Encoding()
    check(build(shelf_in(tmp_path), encode, KEYS[:20]))
    assert sorted(encode.asked) == KEYS[:20]
    again = Encoding()
    check(build(shelf_in(tmp_path), again))
    assert sorted(again.asked) == KEYS[20:]
    third = Encoding()
    check(build(shelf_in(tmp_path), third))
    assert third.asked == []


def test_another_encoder_has_a_shelf_of_its_own(tmp_path: Path) -> None:
    build(shelf_in(tmp_path), Encoding())
    encode = Encoding()
    build(shelf_in(tmp_path, name="cd" * 16), encode)
    assert sorted(encode.asked) == KEYS


def test_features_are_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    keys = [f"0{n}".ljust(32, "0") for n in range(4)]
    build(shelf_in(tmp_path), Encoding(rows=100_000), keys)
    shelf = shelf_in(tmp_path)
    assert shelf.get(keys[0]) is not None
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert any(str(path) in maps for path in shelf.place.glob("*.safetensors"))


def processes(count: int, work: Callable[[int], None]) -> list[Any]:
    """Copies of this process that each do something."""
    context = multiprocessing.get_context("fork")
    found = [context.Process(target=work, args=(n,)) for n in range(count)]
    for process in found:
        process.start()
    return found


class Slow(Encoding):
    def __call__(self, key: str) -> list[Tensor]:
        time.sleep(0.02)
        return super().__call__(key)


def test_several_processes_share_the_work(tmp_path: Path) -> None:
    def work(number: int) -> None:
        encode = Slow()
        check(build(shelf_in(tmp_path / "cache"), encode))
        (tmp_path / f"{number}.json").write_text(json.dumps(encode.asked), encoding="utf-8")

    for process in processes(3, work):
        process.join(60)
        assert process.exitcode == 0
    asked = [json.loads((tmp_path / f"{n}.json").read_text(encoding="utf-8")) for n in range(3)]
    assert sorted(key for own in asked for key in own) == KEYS, "each is made by one of them"
    assert sum(map(bool, asked)) > 1, "several work"


def test_a_process_that_is_killed_leaves_what_is_whole(tmp_path: Path) -> None:
    class Stuck(Encoding):
        def __call__(self, key: str) -> list[Tensor]:
            if len(self.asked) == 20:
                (tmp_path / "stuck").touch()
                time.sleep(600)
            return super().__call__(key)

    def work(_: int) -> None:
        build(shelf_in(tmp_path / "cache"), Stuck())

    (process,) = processes(1, work)
    while not (tmp_path / "stuck").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    encode = Encoding()
    check(build(shelf_in(tmp_path / "cache"), encode))
    assert len(encode.asked) == 12, "buckets that are whole stay, the rest is made, the lock is free"


def test_pieces_are_written_as_they_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    keys = [f"0{n}".ljust(32, "0") for n in range(8)]

    class Fails(Encoding):
        def __call__(self, key: str) -> list[Tensor]:
            if len(self.asked) == 5:
                raise RuntimeError("cannot be decoded")
            return super().__call__(key)

    with pytest.raises(RuntimeError, match="cannot be decoded"):
        build(shelf_in(tmp_path), Fails(), keys)
    encode = Encoding()
    check(build(shelf_in(tmp_path), encode, keys))
    assert encode.asked == keys[5:]


@pytest.mark.parametrize("place", ["header", "data", "end"])
def test_a_corrupted_file_is_made_again(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(shelf_in(tmp_path), Encoding())
    path = sorted((tmp_path / NAME).glob("*.safetensors"))[3]
    content = bytearray(path.read_bytes())
    if place == "end":
        del content[-5:]
    else:
        content[2 if place == "header" else -5] ^= 64
    path.write_bytes(content)
    encode = Encoding()
    with caplog.at_level(logging.WARNING):
        check(build(shelf_in(tmp_path), encode))
    assert encode.asked
    assert {key[0] for key in encode.asked} == {path.name[0]}, "that file's features, and no others"
    assert f"{path}: " in caplog.text
    assert "it is removed and made again" in caplog.text
    assert shelf_in(tmp_path).get(encode.asked[0]) is not None


@pytest.mark.parametrize("hostile", ["link", "huge header", "no header", "a list", "pickle", "folder"])
def test_what_does_not_belong_there_is_not_read(hostile: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(b"private")
    folder = tmp_path / "cache" / NAME
    folder.mkdir(parents=True)
    path = folder / f"0-{'0' * 32}.safetensors"
    content = {
        "huge header": (1 << 60).to_bytes(8, "little") + b"{}",
        "no header": b"abc",
        "a list": (2).to_bytes(8, "little") + b"[]",
        "pickle": b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.",
    }
    if hostile == "link":
        path.symlink_to(elsewhere)
    elif hostile == "folder":
        path.mkdir()
    else:
        path.write_bytes(content[hostile])
    encode = Encoding()
    check(build(shelf_in(tmp_path / "cache"), encode))
    assert sorted(encode.asked) == KEYS
    assert elsewhere.read_bytes() == b"private"
    assert hostile == "folder" or not path.exists()


def test_features_of_another_width_are_made_again(tmp_path: Path) -> None:
    build(shelf_in(tmp_path), Encoding())
    shelf = shelf_in(tmp_path, width=WIDTH + 1)
    assert [shelf.get(key) for key in KEYS] == [None] * len(KEYS)


def test_what_a_trial_uses_is_not_evicted_and_the_next_one_has_room(tmp_path: Path) -> None:
    first = shelf_in(tmp_path, 8000)
    build(first, Encoding(), KEYS[:16])
    second = shelf_in(tmp_path, 8000, name="cd" * 16)
    with pytest.raises(CacheFullError, match="what running trials use takes all of its"):
        build(second, Encoding())
    found = {key: first.get(key) for key in KEYS[:16]}
    assert None not in found.values()
    del first, found
    check(build(shelf_in(tmp_path, 8000, name="cd" * 16), Encoding(), KEYS[:16]))


def test_views_are_kept_as_long_as_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 200)
    shelf = shelf_in(tmp_path, 3000)
    for key in KEYS:
        shelf.keep(key, Encoding()(key))
    shelf.flush()
    assert caplog.text.count("augmented views are not kept from here on") == 1
    kept = [key for key in KEYS if shelf_in(tmp_path, 3000).get(key) is not None]
    assert kept == KEYS[: len(kept)]
    assert 0 < len(kept) < len(KEYS)
    check({key: shelf.get(key) or [] for key in kept})
