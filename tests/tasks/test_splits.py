"""The checks of all splits: none is empty, ids are unique, and no file is in two splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from harness.core.errors import ProblemList, Problems, UserError
from tasks.base import Config, Example, Part, Split
from tasks.splits import FileTask, check_disjoint, check_splits


class _Config(Config):
    root: Path


class _Listed(FileTask):
    """Its splits are given."""

    contexts = ("file", "text")
    modalities: Mapping[str, str] = {}
    metrics = ()
    Config = _Config
    given: Mapping[Split, Sequence[Example]]
    problem = ""

    @classmethod
    def sample(cls, folder: Path) -> dict[str, object]:
        return {"root": str(folder)}

    def read_splits(self, problems: ProblemList) -> Mapping[Split, Sequence[Example]]:
        if self.problem:
            problems.add(self.problem)
            raise PermissionError(13, "Permission denied", "/data/list")
        return self.given


def example(key: str, file: str = "") -> Example:
    return Example(key, (Part("file", Path(file or key)),), ("yes",))


def messages(splits: Mapping[Split, Sequence[Example]]) -> list[str]:
    problems = ProblemList()
    check_splits("/data", splits, problems)
    return problems.messages


def test_splits_that_are_right_pass() -> None:
    # In one split, several questions may be about one file.
    train = [example("a"), example("b", "same"), example("c", "same")]
    assert messages({"train": train, "validation": [example("d")], "test": [example("e")]}) == []


def test_all_that_is_wrong_with_splits_is_reported() -> None:
    train = [example("a"), example("b"), example("b", "c")]
    assert messages({"train": train, "validation": [example("a", "d"), example("e", "b")], "test": []}) == [
        "/data: no examples for test; every split needs at least one",
        "/data: id 'b' is in train and again in train; ids are unique",
        "/data: id 'a' is in train and again in validation; ids are unique",
        "/data: b is in train ('b') and in validation ('e'); splits may not overlap",
    ]


def test_texts_that_are_no_unicode_are_named() -> None:
    """Of every task, whatever it reads: they could not be written, tokenised or scored."""
    problems = ProblemList()
    wrong = Example("a", (Part("user", "hi \udc00"),), ("fine", "so nice \ud83d"))
    check_splits("/data", {"train": [wrong], "validation": [example("b")], "test": [example("c\ud800")]}, problems)
    assert problems.messages == [
        "/data: train: user of 'a': half of a surrogate pair, which is not Unicode text; found 'hi \\udc00'",
        "/data: train: references[1] of 'a': half of a surrogate pair, which is not Unicode text; "
        "found 'so nice \\ud83d'",
        "/data: test: the id of 'c\\ud800': half of a surrogate pair, which is not Unicode text; found 'c\\ud800'",
    ]


def test_a_key_in_two_splits_is_reported_once() -> None:
    problems = ProblemList()
    check_disjoint("/data", "image", {"train": [1, 2, 2], "validation": [3], "test": [2, 2]}, problems)
    assert problems.messages == ["/data: image 2 is in train and in test; splits may not overlap"]


def test_a_file_task_checks_its_splits_once_and_keeps_the_order_of_splits(tmp_path: Path) -> None:
    task = _Listed(_Config(root=tmp_path))
    task.given = {"test": [example("c")], "train": [example("a")], "validation": [example("b")]}
    task.prepare()
    task.given = {}
    assert [task.examples(split)[0].id for split in ("train", "validation", "test")] == ["a", "b", "c"]
    task = _Listed(_Config(root=tmp_path))
    task.given = {"train": [example("a")], "validation": [example("a")], "test": [example("c")]}
    with pytest.raises(Problems, match=rf"{tmp_path}: id 'a' is in train and again in validation"):
        task.prepare()


def test_a_file_task_reports_what_it_could_not_read_with_what_it_found_before(tmp_path: Path) -> None:
    task = _Listed(_Config(root=tmp_path))
    task.problem = "line 1 is empty"
    with pytest.raises(UserError, match=r"line 1 is empty\n/data/list: cannot be read: Permission denied"):
        task.examples("test")
