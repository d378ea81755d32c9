"""The task ``trends``: curves match their descriptions, and no trend is in two splits."""

from __future__ import annotations

import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.core.errors import UserError
from tasks.base import Split
from tasks.drawing.trend import (
    AMPLITUDES,
    KINDS,
    LENGTHS,
    NOISE,
    Move,
    Trend,
    curve,
    descriptions,
    draw_trend,
    generator,
)
from tasks.modalities.series import Series
from tasks.trends import Trends

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SIZE_WORDS = r"\b(?:small|little|large|lot)\b"
SIGN = {"rise": 1, "peak": 1, "jump": 1, "wave": 1, "fall": -1, "dip": -1, "drop": -1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def trends(train: int = 8, **options: Any) -> Trends:
    task = Trends(Trends.Config(train_examples=train, validation_examples=4, test_examples=4, **options))
    task.prepare()
    return task


def content(task: Trends, split: Split) -> list[tuple[str, bytes, tuple[str, ...]]]:
    return [(e.id, e.files[0][1].read_bytes(), e.references) for e in task.examples(split)]


def test_series_are_files_that_the_modality_reads() -> None:
    task = trends()
    assert [len(task.examples(split)) for split in SPLITS] == [8, 4, 4]
    for example in task.examples("train"):
        assert len(set(example.references)) == 5
        ((context, path),) = example.files
        assert context == "series"
        assert LENGTHS[0] <= len(Series().load(path)) <= 3 * LENGTHS[1]


def test_more_examples_extend_a_smaller_set_and_seeds_differ() -> None:
    small, large, other = trends(4), trends(9), trends(4, data_seed=1)
    assert content(large, "train")[:4] == content(small, "train")
    assert content(large, "test") == content(small, "test")
    assert all(a[1] != b[1] for a, b in zip(content(small, "train"), content(other, "train"), strict=True))


def test_several_at_once_prepare_one_set() -> None:
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: content(trends(), "train"), range(4)))
    assert all(one == sets[0] for one in sets)


def test_prepare_is_idempotent_and_what_was_left_half_written_is_drawn_again() -> None:
    task = trends()
    written = task.folder.stat().st_mtime_ns
    task.prepare()
    assert task.folder.stat().st_mtime_ns == written
    partial = task.folder.rename(task.folder.with_name(f".{task.folder.name}.partial"))
    (partial / "test.jsonl").unlink()
    task.prepare()
    assert len(task.examples("test")) == 4
    assert not partial.exists()


def test_a_cache_that_is_in_the_way_or_broken_is_named(cache: Path) -> None:
    task = trends()
    (task.folder / "test.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"test\.jsonl: cannot be read: JSONDecodeError.*delete the folder"):
        task.examples("test")
    cache.rename(cache.with_name("moved"))
    cache.write_text("in the way")
    with pytest.raises(UserError, match=r"cache/trends/\w+: cannot write the data of the task trends"):
        trends()


def test_splits_share_no_trend_whatever_the_seed() -> None:
    drawn = {
        split: {draw_trend(generator(seed, split, index), split) for seed in range(3) for index in range(400)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert drawn[one].isdisjoint(drawn[other])
    assert all(len(unique) > 300 for unique in drawn.values())


@pytest.mark.parametrize("size", AMPLITUDES)
@pytest.mark.parametrize("kind", SIGN)
def test_a_curve_moves_as_its_kind_and_size_say(kind: str, size: str) -> None:
    lowest, highest = AMPLITUDES[size]
    for seed in range(20):
        values = np.array(curve(Trend((Move("level", ""), Move(kind, size)), False), generator(kind, seed)))
        moved = values - values[0]  # it starts level
        top = moved[np.abs(moved).argmax()]
        assert 0.95 * lowest <= abs(top) <= highest  # a peak may be between two values
        steps = np.abs(np.diff(moved))
        if kind == "wave":
            halves = (np.diff(np.sign(moved[np.abs(moved) > 1e-9])) != 0).sum() + 1
            assert halves in (4, 6)  # two or three periods
        else:
            assert np.sign(top) == SIGN[kind]
            returns = kind in ("peak", "dip")
            assert abs(moved[-1]) == pytest.approx(0.0 if returns else abs(top), abs=1e-9)
        assert np.isclose(steps.max(), abs(top)) == (kind in ("jump", "drop"))


def test_noise_is_on_noisy_curves_alone() -> None:
    level = (Move("level", ""),)
    assert len(set(curve(Trend(level, False), generator(0)))) == 1
    noisy = np.concatenate([np.diff(curve(Trend(level, True), generator(seed))) for seed in range(50)])
    assert noisy.std() == pytest.approx(np.sqrt(2) * NOISE, rel=0.1)


def _kinds_in_order(text: str) -> list[str]:
    """What a description names, in the order of time."""
    words = {
        "peak": "peak", "dip": "dip", "wave": "waves?", "jump": "step up", "drop": "step down", "level": "level",
        "rise": "rise|goes up", "fall": "fall|goes down",
    }  # fmt: skip
    pattern = "|".join(f"(?P<{kind}>{forms})" for kind, forms in words.items())
    found = [(match.lastgroup, match.start()) for match in re.finditer(pattern, text)]
    kinds = [str(kind) for kind, _ in found]
    if text.startswith("between"):
        return [kinds[0], kinds[2], kinds[1]]
    later_first = " follows " in text or re.match(r"it .* after ", text)
    return kinds[::-1] if later_first else kinds


def test_descriptions_say_what_happens_in_which_order_and_how_strongly() -> None:
    for index in range(300):
        rng = generator("words", index)
        trend = draw_trend(rng, "train")
        for text in descriptions(trend, rng, 5):
            assert _kinds_in_order(text) == [move.kind for move in trend.moves], text
            said = ["small" if word in ("small", "little") else "large" for word in re.findall(SIZE_WORDS, text)]
            assert sorted(said) == sorted(move.size for move in trend.moves if move.size), text
            assert ("with noise" not in text) if not trend.noisy else ("without noise" not in text)


def test_every_kind_is_drawn() -> None:
    drawn = [draw_trend(generator(index), "train") for index in range(100)]
    assert {move.kind for trend in drawn for move in trend.moves} == set(KINDS)
    assert {trend.noisy for trend in drawn} == {True, False}
