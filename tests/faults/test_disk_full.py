"""A disk that is full, a small one in memory: what is written is whole or not there, and the message names it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from harness.core.files import DiskFullError, atomic, write_atomically
from harness.core.lease import leased
from harness.core.record import read_run, write_record
from harness.core.shared_folder import SharedFolder
from harness.tracking.journal import JOURNAL, Journal
from results.report import write_report
from tests.support.disks import fill
from tests.support.runs import fake_plan, write_run

pytestmark = pytest.mark.faults
SIZE_MB = 16


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(place)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.ones(1000)}


def safetensors(path: Path) -> None:
    with atomic(path) as partial:
        save_file(tensors(), partial)


def torch_file(path: Path) -> None:
    with atomic(path) as partial:
        torch.save(tensors(), partial)


def parquet(path: Path) -> None:
    with atomic(path) as partial:
        pd.DataFrame({"score": range(100_000)}).to_parquet(partial)


WRITERS: dict[str, Callable[[Path], None]] = {
    "plan.json": lambda path: write_atomically(path, "x" * 9000),
    "best.safetensors": safetensors,
    "state.pt": torch_file,
    "examples.parquet": parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_whole_or_as_it_was(disk: Path, name: str) -> None:
    path, write = disk / "run" / name, WRITERS[name]
    path.parent.mkdir()
    filler = fill(disk)
    with pytest.raises(DiskFullError, match=rf"^{path}: could not be written: the disk is full; free some space"):
        write(path)
    assert list(path.parent.iterdir()) == []
    filler.unlink()
    write(path)
    whole = path.read_bytes()
    fill(disk)
    with pytest.raises(DiskFullError, match=name):
        write(path)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_a_report_is_one_message_and_exit_code_1_and_there_when_there_is_space(disk: Path) -> None:
    folder = write_run(disk / "run", fake_plan(settings=("",)))
    before = read_run(folder).records
    filler = fill(disk)
    command = [sys.executable, "-m", "harness", "report", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{folder}/report/index.html: could not be written: the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list((folder / "report").glob("*")) == []
    with pytest.raises(DiskFullError, match="record"):
        write_record(folder, next(iter(before.values())).model_copy(update={"reason": "x" * 9000}))
    assert read_run(folder).records == before
    filler.unlink()
    assert all(path.is_file() for path in write_report([folder]).all)


def test_a_journal_loses_the_line_that_was_cut_and_no_other(disk: Path) -> None:
    journal = Journal(disk / "trial")
    journal.begin()
    journal.add({"epoch/train_loss": 1.0}, 1)
    filler = fill(disk)

    def add_many() -> None:
        for step in range(2, 2000):
            journal.add({"epoch/train_loss": 1.0 / step}, step)

    with pytest.raises(OSError, match=r"disk is full|No space left"):
        add_many()
    kept = Journal(disk / "trial").points
    assert 1 <= len(kept) < len(journal.points), "in memory there is what is not on disk"
    filler.unlink()
    again = Journal(disk / "trial")
    again.begin()
    again.add({"epoch/train_loss": 7.0}, 9999)
    assert [point.step for point in Journal(disk / "trial").points] == [*(point.step for point in kept), 9999]
    assert (disk / "trial" / JOURNAL).is_file()


def test_a_lease_is_kept_and_given_back_on_a_full_disk(disk: Path) -> None:
    place = SharedFolder(disk)
    with leased(place, None, print) as lease:
        filler = fill(disk)
        place.write(next(iter(place.files(".lease"))), b'{"beat": 2}')  # as the thread that renews it does
        lease.check()
        assert len(place.files(".lease")) == 1
    filler.unlink()
    with leased(place, None, print) as again:
        assert again.number > lease.number
