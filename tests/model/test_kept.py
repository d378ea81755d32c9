"""What a worker keeps between trials: the store, and features of files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from harness.model.features import Features
from harness.model.kept import Kept
from tasks.base import Example, Part
from tasks.encoder import Encoder

CPU = torch.device("cpu")


class Made:
    """Makes values, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


def get(kept: Kept, name: str, made: Made, size_bytes: int = 10, **options: Any) -> int:
    return kept.of(("number", name), made, lambda _: size_bytes, **options)


def test_a_value_is_made_once() -> None:
    kept, made = Kept(), Made()
    assert [get(kept, "a", made), get(kept, "a", made), get(kept, "b", made)] == [1, 1, 2]


def test_the_least_recently_used_value_goes_first() -> None:
    kept, made = Kept(25), Made()
    get(kept, "a", made), get(kept, "b", made)
    get(kept, "a", made)
    get(kept, "c", made)  # "b" goes
    assert [name for name in "abc" if ("number", name) in kept] == ["a", "c"]


@pytest.mark.parametrize(("limit_bytes", "size_bytes"), [(0, 0), (0, 10), (25, 26)])
def test_what_is_larger_than_the_limit_is_made_each_time(limit_bytes: int, size_bytes: int) -> None:
    kept, made = Kept(limit_bytes), Made()
    assert [get(kept, "a", made, size_bytes), get(kept, "a", made, size_bytes)] == [1, 2]


def test_models_of_other_backbones_are_freed() -> None:
    kept, made = Kept(), Made()
    get(kept, "a", made), get(kept, "b", made)
    kept.of(("text", "a"), str, len)
    kept.forget("number", but=("number", "b"))
    assert [("number", "a") in kept, ("number", "b") in kept, ("text", "a") in kept] == [False, True, True]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_or_an_interrupt_drops_everything(error: type[BaseException]) -> None:
    kept, made = Kept(), Made()
    get(kept, "a", made)
    with pytest.raises(error, match="half way"), kept.dropped_on_error():
        raise error("half way")
    assert get(kept, "a", made) == 2


def test_the_growth_of_a_process_is_that_of_a_trial_alone() -> None:
    kept, made = Kept(), Made()
    kept.begin()
    get(kept, "encoder", made, 100, device="cuda"), get(kept, "model", made, 7, spare=lambda _: True)
    assert (kept.shift_bytes(CPU), kept.shift_bytes(torch.device("cuda"))) == (7, 0)
    kept.begin()
    for _ in range(2):  # what is used twice counts once
        get(kept, "encoder", made, 100, device="cuda"), get(kept, "model", made, 7, spare=lambda _: True)
    assert (kept.shift_bytes(CPU), kept.shift_bytes(torch.device("cuda"))) == (0, -100)


class Lengths(Encoder):
    """The size of each file; remembers what it was asked for."""

    width = 1

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []

    def encode(self, items: Sequence[Any]) -> list[Tensor]:
        self.asked.append(list(items))
        return [torch.full((1, 1), float(item)) for item in items]


class Sizes:
    """A modality that reads the size of a file."""

    def load(self, path: Path) -> int:
        return path.stat().st_size


class Task:
    modalities: ClassVar = {"image": "sizes"}
    augmented: frozenset[str] = frozenset()

    def members(self) -> dict[str, Task]:
        return {"": self}


def encoded(kept: Kept, encoder: Lengths, paths: Sequence[Path], key: Any = ("encoder", 1)) -> list[float]:
    """The features that another trial with this encoder finds."""
    features = Features(Task(), {"sizes": Sizes()}, {"sizes": encoder}, CPU, kept, {"sizes": key})  # type: ignore[arg-type, dict-item]
    examples = [Example(path.name, (Part("image", path),), ("a",)) for path in paths]
    features.precompute(examples, [], lambda: None)
    return [row.item() for rows in features.of(examples) for row in rows]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{size}.bin" for size in (1, 2, 3)]
    for size, path in enumerate(found, 1):
        path.write_bytes(b"x" * size)
    return found


def test_files_are_encoded_once_for_all_trials(paths: list[Path]) -> None:
    kept, encoder = Kept(), Lengths()
    assert encoded(kept, encoder, paths) == encoded(kept, encoder, paths) == [1, 2, 3]
    assert encoder.asked == [[1, 2, 3]]


def test_features_are_kept_only_for_the_same_batch_and_encoder(paths: list[Path]) -> None:
    """Rounding may depend on the other items of a batch."""
    kept, encoder = Kept(), Lengths()
    for part, key in ((paths, "a"), (paths[:2], "a"), (paths[::-1], "a"), (paths, "b"), (paths, None), (paths, None)):
        encoded(kept, encoder, part, key and ("encoder", key))
    assert encoder.asked == [[1, 2, 3], [1, 2], [3, 2, 1], [1, 2, 3], [1, 2, 3], [1, 2, 3]]


def test_a_file_that_has_changed_is_encoded_again(paths: list[Path]) -> None:
    kept, encoder = Kept(), Lengths()
    encoded(kept, encoder, paths)
    paths[0].write_bytes(b"12345")
    assert encoded(kept, encoder, paths) == [5, 2, 3]
    os.utime(paths[0], ns=(1, 1))  # of the same size
    encoded(kept, encoder, paths)
    assert len(encoder.asked) == 3


def test_a_file_that_is_gone_is_an_error_of_its_own(paths: list[Path]) -> None:
    kept, encoder = Kept(), Lengths()
    encoded(kept, encoder, paths)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.bin"):
        encoded(kept, encoder, paths)
