"""The contract of tasks: checks on a task's sample. The first line of each docstring is printed as what is checked.

A check yields one message per problem. This module does not import torch, because one check is that a task does not.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from pydantic_core import to_json

from harness.core.errors import did_you_mean
from tasks.base import Config, Example, Modality, Split, Task
from tasks.registry import METRICS, MODALITIES
from tasks.splits import SPLITS, empty_splits, repeated_ids, shared_files

Splits = dict[Split, list[Example]]


class TaskSubject:
    """A task class, and the task on its own sample.

    Args:
        task_class: the task.
        target: location of the class, as "module:Class" or "/folder/file.py:Class".
        folder: an empty folder for the sample.
    """

    def __init__(self, task_class: type[Task], target: str, folder: Path) -> None:
        self.plugin, self.target, self.folder = task_class, target, folder

    @cached_property
    def options(self) -> bytes:
        """The options of the sample as JSON, as in the spec of a trial."""
        return to_json(self.plugin.sample(self.folder))

    def new(self) -> Task:
        """A new instance of the task on its sample."""
        return self.plugin(self.plugin.Config.model_validate_json(self.options, strict=True))

    @cached_property
    def task(self) -> Task:
        """The task on its sample, prepared."""
        task = self.new()
        task.prepare()
        return task

    @cached_property
    def splits(self) -> Splits:
        """The examples of the three splits."""
        return read(self.task)

    @cached_property
    def readers(self) -> Mapping[str, Modality]:
        """The modality that reads the files of each context."""
        return {c: MODALITIES.load(MODALITIES.find(name).target)() for c, name in self.task.modalities.items()}

    def each(self) -> Iterator[tuple[str, Example]]:
        """Every example with its description for messages."""
        for split, examples in self.splits.items():
            for example in examples:
                yield f"{split} example {example.id!r}", example


def read(task: Task) -> Splits:
    """The examples of the three splits of a prepared task."""
    return {split: list(task.examples(split)) for split in SPLITS}


def sample_gives_options(subject: TaskSubject) -> Iterator[str]:
    """`sample` returns options that `Config` accepts."""
    config_class: Any = subject.plugin.Config
    if not (isinstance(config_class, type) and issubclass(config_class, Config)):
        yield f"Config is {config_class!r}; it must be a subclass of harness.TaskConfig"
        return
    subject.new()


def sample_can_be_read(subject: TaskSubject) -> Iterator[str]:
    """`prepare` and `examples` work on the sample, and every example is a `harness.Example`."""
    for split in SPLITS:
        found: list[Any] = [*subject.splits[split]]
        for example in found:
            if not isinstance(example, Example):
                yield f"{split} contains a {type(example).__name__}; every example must be a harness.Example"
                return


def contexts_are_distinct(subject: TaskSubject) -> Iterator[str]:
    """Context names are valid and unique, and the last context, which is that of the answer, is text."""
    contexts = tuple(subject.task.contexts)
    if not contexts or not all(isinstance(name, str) and name and not set(name) & set(" \t\n") for name in contexts):
        yield f"contexts are {contexts!r}; required: one or more names without white space"
    if twice := [name for name, times in Counter(contexts).items() if times > 1]:
        yield f"context {twice[0]!r} is listed twice; names of contexts must be unique"
    if contexts and contexts[-1] in subject.task.modalities:
        yield f"the last context, {contexts[-1]!r}, is read from files; it is that of the answer, so it must be text"
    for context in [*subject.task.modalities, *subject.task.augmented]:
        if context not in contexts:
            yield f"modalities or augmented contain the unknown context {context!r}; {did_you_mean(context, contexts)}"


def names_are_registered(subject: TaskSubject) -> Iterator[str]:
    """Its modalities and metrics are registered."""
    for registry, names in ((MODALITIES, subject.task.modalities.values()), (METRICS, subject.task.metrics)):
        if isinstance(names, str):
            yield f"metrics is a string, {names!r}; it must be a tuple of names"
            continue
        for name in names:
            if name not in registry.entries():
                yield f"unknown {registry.kind} {name!r}; {did_you_mean(name, registry.entries())}"


def options_are_strict(subject: TaskSubject) -> Iterator[str]:
    """Unknown options are rejected."""
    options = {**json.loads(subject.options), "no_such_option": 1}
    with contextlib.suppress(ValidationError):
        subject.plugin.Config.model_validate_json(json.dumps(options))
        yield "the key 'no_such_option' was silently accepted; Config must keep extra='forbid'"


def options_survive_json(subject: TaskSubject) -> Iterator[str]:
    """Its options survive a round trip through JSON."""
    config = subject.new().config
    again = type(config).model_validate_json(config.model_dump_json(), strict=True)
    if again != config:
        yield f"{config!r} became {again!r}; the options of a trial are stored as JSON"


def it_is_repeatable(subject: TaskSubject) -> Iterator[str]:
    """Examples are the same on every call, after another `prepare`, and from another instance."""
    subject.task.prepare()
    again, other = read(subject.task), subject.new()
    other.prepare()
    others = read(other)
    for split in SPLITS:
        for when, found in (("on a second call", again[split]), ("from another instance", others[split])):
            if found != subject.splits[split]:
                yield f"{split} is different {when}; the content and the order of a split must be fixed"


def splits_are_not_empty(subject: TaskSubject) -> Iterator[str]:
    """None of the three splits is empty."""
    yield from empty_splits(subject.splits)


def ids_are_unique(subject: TaskSubject) -> Iterator[str]:
    """Example ids are non-empty strings, and unique across the splits."""
    for split, examples in subject.splits.items():
        for example in examples:
            if not isinstance(example.id, str) or not example.id:
                yield f"{split} has the id {example.id!r}; allowed: a non-empty string"
    yield from repeated_ids(subject.splits)


def splits_share_no_file(subject: TaskSubject) -> Iterator[str]:
    """No file is in two splits."""
    yield from shared_files(subject.splits, resolve=True)


def inputs_are_of_their_context(subject: TaskSubject) -> Iterator[str]:
    """Every input belongs to a known context: a file if a modality reads that context, otherwise text."""
    task = subject.task
    for where, example in subject.each():
        for context, value in example.inputs:
            if context not in task.contexts:
                yield f"{where}: an input of context {context!r}; {did_you_mean(str(context), task.contexts)}"
            elif context in task.modalities and not isinstance(value, Path):
                yield f"{where}: {context!r} is {value!r}; {task.modalities[context]} reads it, so it must be a Path"
            elif context in task.modalities and not Path(value).is_file():
                yield f"{where}: {value} is not a file"
            elif context not in task.modalities and not isinstance(value, str):
                yield f"{where}: {context!r} is {value!r}; no modality reads it, so it must be a string"


def files_can_be_decoded(subject: TaskSubject) -> Iterator[str]:
    """Every file can be decoded by its modality."""
    for where, example in subject.each():
        for context, path in example.files:
            if subject.readers[context].load(path) is None:
                yield f"{where}: {path} was decoded to nothing"


def references_are_texts(subject: TaskSubject) -> Iterator[str]:
    """Every example has at least one reference, and none is empty."""
    for where, example in subject.each():
        references: Any = example.references
        if isinstance(references, str) or not references:
            yield f"{where}: references are {references!r}; required: one or more strings"
        elif wrong := [text for text in references if not isinstance(text, str) or not text.strip()]:
            yield f"{where}: a reference is {wrong[0]!r}; allowed: non-empty strings"


def targets_are_known(subject: TaskSubject) -> Iterator[str]:
    """The target context of every example is known, and is text."""
    text = [context for context in subject.task.contexts if context not in subject.task.modalities]
    for where, example in subject.each():
        if example.target is not None and example.target not in text:
            yield f"{where}: its target is {example.target!r}; {did_you_mean(str(example.target), text)}"


def augment_is_reproducible(subject: TaskSubject) -> Iterator[str]:
    """`augment` depends only on its generator, keeps the type of the item, and does not modify it in place."""
    task, seen = subject.task, set()
    for _, example in subject.each():
        for context, path in example.files:
            if context in seen:
                continue
            seen.add(context)
            item, untouched = subject.readers[context].load(path), subject.readers[context].load(path)
            drawn = [task.augment(context, item, np.random.default_rng(seed)) for seed in (0, 0)]
            if not same(item, untouched):
                yield f"augment modified the {context} item in place; it must return a new item or the unchanged one"
            elif not same(*drawn):
                yield f"augment returned different items for one {context} and seed; use only `rng` for randomness"
            if type(drawn[0]) is not type(item):
                yield f"augment turned a {type(item).__name__} into a {type(drawn[0]).__name__}; the type must stay"
            elif context not in task.augmented and not same(drawn[0], untouched):
                yield f"augment changes {context}, which `augmented` lacks: cached features would be used instead"


def clusters_hold_what_is_shared(subject: TaskSubject) -> Iterator[str]:
    """The cluster of an example is a non-empty string or None, and no file is in examples of two clusters."""
    for split, examples in subject.splits.items():
        for example in examples:
            found: Any = example.cluster
            if found is not None and not (isinstance(found, str) and found):
                yield f"{split} example {example.id!r}: its cluster is {found!r}; allowed: a non-empty string, or None"
                return
        first: dict[Path, Example] = {}
        users = Counter(path for example in examples for path in {path for _, path in example.files})
        for example in (example for example in examples if example.cluster is not None):
            for _, path in example.files:
                other = first.setdefault(path, example)
                if other.cluster != example.cluster and users[path] < len(examples):  # one of all is like a prompt
                    clusters = f"{other.cluster!r} ({other.id!r}) and {example.cluster!r} ({example.id!r})"
                    yield f"{split}: {path} is in two clusters, {clusters}; what shares a file is not independent"
                    return


def members_have_shares(subject: TaskSubject) -> Iterator[str]:
    """Every example belongs to a member, and the members' shares of the training draws sum to 1."""
    members = subject.task.members()
    sizes = Counter(example.member for example in subject.splits["train"])
    for where, example in subject.each():
        if example.member not in members:
            yield f"{where}: its member is {example.member!r}; {did_you_mean(example.member, members)}"
            return
    shares = subject.task.shares(sizes)
    if set(shares) != set(sizes) or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-9:
        yield f"shares of {dict(sizes)} are {dict(shares)}; required: one above 0 for each member, with a sum of 1"


FIRST: tuple[Callable[[TaskSubject], Iterator[str]], ...] = (sample_gives_options, sample_can_be_read)
THEN: tuple[Callable[[TaskSubject], Iterator[str]], ...] = (
    contexts_are_distinct, names_are_registered, options_are_strict, options_survive_json, it_is_repeatable,
    splits_are_not_empty, ids_are_unique, splits_share_no_file, inputs_are_of_their_context, files_can_be_decoded,
    references_are_texts, targets_are_known, augment_is_reproducible, clusters_hold_what_is_shared,
    members_have_shares,
)  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Whether two decoded items of any type are equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "tobytes"):  # arrays and pictures
        extent = [(getattr(x, "shape", None), getattr(x, "size", None)) for x in (one, other)]
        return extent[0] == extent[1] and bool(one.tobytes() == other.tobytes())
    if hasattr(one, "numpy"):  # tensors
        return same(one.numpy(), other.numpy())
    return same(vars(one), vars(other)) if hasattr(one, "__dict__") else bool(one == other)
