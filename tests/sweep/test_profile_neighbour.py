"""The real measuring process: what it finds alone, and beside programs that keep all cores busy."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

import harness
from harness.core.profile import Measured, Profile, ProfileEntry
from harness.core.source import read_yaml
from tests.support.profiled import trained

ROOT = Path(__file__).parents[2]


def burn() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        pass


@contextmanager
def neighbours() -> Iterator[None]:
    """A busy loop for each core."""
    context = multiprocessing.get_context("spawn")
    loops = [context.Process(target=burn, daemon=True) for _ in range(os.cpu_count() or 1)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.terminate()
            loop.join()


def time_of(entry: ProfileEntry) -> Measured:
    assert entry.reason is None
    assert entry.step_time_ratio is not None
    return entry.step_time_ratio


def separated(profile: Profile) -> set[tuple[str, str]]:
    """Pairs of methods, the first faster than the second, whose intervals do not overlap; the reference has 1."""
    pairs = itertools.permutations(profile.entries, 2)
    times = {entry.key: time_of(entry) for entry in profile.entries}
    ends = {key: (t.low if t.low is not None else t.median, t.high if t.high is not None else t.median)
            for key, t in times.items()}  # fmt: skip
    return {(one.name, other.name) for one, other in pairs if ends[one.key][1] < ends[other.key][0]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_burning_neighbour_changes_no_ranking_of_speeds(tmp_path: Path) -> None:
    content, _ = read_yaml(ROOT / "experiments" / "quickstart.yaml")
    folder = trained(tmp_path, **content | {"seeds": [0]})
    quiet = Console(quiet=True)
    alone = harness.profile_run(folder, console=quiet)
    with neighbours():
        beside = harness.profile_run(folder, fresh=True, console=quiet)
    medians = [{entry.name: time_of(entry).median for entry in profile.entries} for profile in (alone, beside)]
    for name, ratio in medians[0].items():
        print(f"{name}: {ratio:.3f} alone, {medians[1][name]:.3f} beside busy loops")  # noqa: T201 - shown with -s
    order = separated(alone)
    assert len(order) >= 8  # of 28
    swapped = {pair for pair in order if medians[1][pair[0]] > medians[1][pair[1]]}
    contradicted = {pair for pair in order if pair[::-1] in separated(beside)}
    assert swapped == contradicted == set()
    for one, other in zip(alone.entries, beside.entries, strict=True):
        assert one.peak_memory_bytes is not None
        assert other.peak_memory_bytes is not None
        assert other.peak_memory_bytes.median == pytest.approx(one.peak_memory_bytes.median, rel=0.05)
