"""Tasks that read their splits from files, and the checks that apply to all of them."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import get_args

from harness.core.errors import ProblemList, UserError
from tasks.base import Example, Split, Task
from tasks.containers.text_files import unicode_problem
from tasks.parsed import parsed_once

SPLITS: tuple[Split, ...] = get_args(Split)


class FileTask(Task):
    """A task whose data are files: all splits are read and checked together, when the first one is needed."""

    @abstractmethod
    def read_splits(self, problems: ProblemList) -> Mapping[Split, Sequence[Example]]:
        """All splits, each in a fixed order; they are checked by ``check_splits`` afterwards.

        Args:
            problems: collects what is wrong while reading goes on; if there is anything, the splits are not used.

        Raises:
            UserError: nothing further can be read.
            OSError: a file or folder could not be read.
        """

    def annotation_files(self) -> Sequence[Path] | None:
        """The files that the examples are read from, besides the names of their inputs: they are parsed once a machine.

        None, by default: not known, so they are parsed by every trial.

        Raises:
            UserError: they cannot be found, which ``read_splits`` says again.
        """
        return None

    @property
    def root(self) -> Path:
        """The folder of the data, which messages name: the option ``root``."""
        return Path(self.config.root)

    @cached_property
    def _splits(self) -> Mapping[Split, Sequence[Example]]:
        files: Sequence[Path] | None = None
        with suppress(UserError, OSError):  # reading says what is wrong
            files = self.annotation_files()
        return parsed_once(self, files, self._read_and_check)

    def _read_and_check(self) -> Mapping[Split, Sequence[Example]]:
        problems = ProblemList()
        splits: Mapping[Split, Sequence[Example]] = {}
        try:
            splits = self.read_splits(problems)
            if not problems.messages:  # a rejected row may be the reason that a split is empty
                check_splits(self.root, splits, problems)
        except UserError as error:
            problems.add(error)
        except OSError as error:
            problems.add(f"{error.filename}: cannot be read: {error.strerror}")
        problems.raise_any()
        return {split: tuple(splits[split]) for split in SPLITS}

    def prepare(self) -> None:
        """Read and check every split; nothing is downloaded.

        Raises:
            UserError: something is missing or broken; all problems at once.
        """
        _ = self._splits

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of a split, in the order of its files.

        Raises:
            UserError: as ``prepare``.
        """
        return self._splits[split]


def check_splits(where: object, splits: Mapping[Split, Sequence[Example]], problems: ProblemList) -> None:
    """Check that every split has examples, no id occurs twice, texts are Unicode, and no file is in two splits.

    Args:
        where: the beginning of each message: a folder, or a key of the experiment.
        problems: receives what is wrong.
    """
    for check in (empty_splits, repeated_ids, broken_texts, shared_files):
        for message in check(splits):
            problems.add(f"{where}: {message}")


def empty_splits(splits: Mapping[Split, Sequence[Example]]) -> Iterator[str]:
    """A message for every split without examples."""
    for split, examples in splits.items():
        if not examples:
            yield f"no examples for {split}; every split needs at least one"


def repeated_ids(splits: Mapping[Split, Sequence[Example]]) -> Iterator[str]:
    """A message for every example whose id occurs before, in the same split or in another one."""
    seen: dict[str, Split] = {}
    for split, examples in splits.items():
        for example in examples:
            if example.id in seen:
                yield f"id {example.id!r} is in {seen[example.id]} and again in {split}; ids are unique"
            seen[example.id] = split


def broken_texts(splits: Mapping[Split, Sequence[Example]]) -> Iterator[str]:
    """A message for every text that is not Unicode."""
    for split, examples in splits.items():
        for example in examples:
            for place, text in _texts(example):
                if problem := unicode_problem(text):
                    yield f"{split}: {place} of {example.id!a}: {problem}"


def _texts(example: Example) -> Iterator[tuple[str, str]]:
    """The texts of an example, each with its place."""
    yield "the id", example.id
    for context, value in example.inputs:
        if isinstance(value, str):
            yield context, value
    for number, text in enumerate(example.references):
        yield f"references[{number}]", text


def shared_files(splits: Mapping[Split, Sequence[Example]], resolve: bool = False) -> Iterator[str]:
    """A message for every file that is in two splits.

    Args:
        splits: the examples.
        resolve: also find files that two different links lead to; slow for large data sets.
    """
    files: dict[Path, tuple[Split, str]] = {}
    shared: dict[Path, str] = {}
    for split, examples in splits.items():
        for example in examples:
            for _, path in example.files:
                key = path.resolve() if resolve else path
                other, other_id = files.setdefault(key, (split, example.id))
                if other != split:
                    found = f"{path} is in {other} ({other_id!r}) and in {split} ({example.id!r})"
                    shared.setdefault(key, f"{found}; splits may not overlap")
    yield from shared.values()


def check_disjoint(where: object, what: str, keys: Mapping[Split, Iterable[object]], problems: ProblemList) -> None:
    """Check that no key (an image id, a file of many examples) is in two splits.

    Args:
        where: the beginning of each message.
        what: a key is, such as "image".
        problems: receives what is wrong.
    """
    seen: dict[object, Split] = {}
    for split, of_split in keys.items():
        for key in dict.fromkeys(of_split):
            if seen.setdefault(key, split) != split:
                problems.add(f"{where}: {what} {key} is in {seen[key]} and in {split}; splits may not overlap")


def in_test_half(key: str) -> bool:
    """Whether an image belongs to the half of the validation images that is tested on, by a hash of its id."""
    return hashlib.sha256(key.encode()).digest()[0] % 2 == 1
