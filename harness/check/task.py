"""What every task promises: checks on its sample, each a function whose first line of documentation is the promise.

A check yields what is wrong, in sentences. Imports no torch: one of the promises is that a task does not.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import ValidationError
from pydantic_core import to_json

from harness.core.errors import did_you_mean
from tasks.base import Config, Example, Modality, Split, Task
from tasks.registry import METRICS, MODALITIES

SPLITS: tuple[Split, ...] = get_args(Split)
Splits = dict[Split, list[Example]]


class TaskSubject:
    """A task class and what it makes of its own sample.

    Args:
        task_class: the task.
        target: where its class lies, as "module:Class" or "/folder/file.py:Class".
        folder: an empty one for the sample.
    """

    def __init__(self, task_class: type[Task], target: str, folder: Path) -> None:
        self.plugin, self.target, self.folder = task_class, target, folder

    @cached_property
    def options(self) -> bytes:
        """The sample's options as JSON, as they travel in an experiment."""
        return to_json(self.plugin.sample(self.folder))

    def new(self) -> Task:
        """The task on its sample, made anew."""
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
        """What reads the files, by context."""
        return {c: MODALITIES.load(MODALITIES.find(name).target)() for c, name in self.task.modalities.items()}

    def each(self) -> Iterator[tuple[str, Example]]:
        """Every example, with words that say which it is."""
        for split, examples in self.splits.items():
            for example in examples:
                yield f"{split} example {example.id!r}", example


def read(task: Task) -> Splits:
    """The examples of the three splits of a prepared task."""
    return {split: list(task.examples(split)) for split in SPLITS}


def sample_gives_options(subject: TaskSubject) -> Iterator[str]:
    """Its sample gives options that its Config takes."""
    config_class: Any = subject.plugin.Config
    if not (isinstance(config_class, type) and issubclass(config_class, Config)):
        yield f"Config is {config_class!r}; it must be a subclass of harness.TaskConfig"
        return
    subject.new()


def sample_can_be_read(subject: TaskSubject) -> Iterator[str]:
    """Its sample is prepared and read as examples."""
    for split in SPLITS:
        found: list[Any] = [*subject.splits[split]]
        for example in found:
            if not isinstance(example, Example):
                yield f"{split} holds a {type(example).__name__}; examples are harness.Example"
                return


def contexts_are_distinct(subject: TaskSubject) -> Iterator[str]:
    """Its contexts are named and distinct, and the last one, of the answer, is text."""
    contexts = tuple(subject.task.contexts)
    if not contexts or not all(isinstance(name, str) and name and not set(name) & set(" \t\n") for name in contexts):
        yield f"contexts are {contexts!r}; one or more names without white space are needed"
    if twice := [name for name, times in Counter(contexts).items() if times > 1]:
        yield f"context {twice[0]!r} is there twice; every context has a name of its own"
    if contexts and contexts[-1] in subject.task.modalities:
        yield f"the last context, {contexts[-1]!r}, is read from files; the last one is the answer's, which is text"
    for context in [*subject.task.modalities, *subject.task.augmented]:
        if context not in contexts:
            yield f"modalities or augmented name {context!r}; {did_you_mean(context, contexts)}"


def names_are_registered(subject: TaskSubject) -> Iterator[str]:
    """The modalities and metrics it names are registered."""
    for registry, names in ((MODALITIES, subject.task.modalities.values()), (METRICS, subject.task.metrics)):
        if isinstance(names, str):
            yield f"metrics is one string, {names!r}; a tuple of names is needed"
            continue
        for name in names:
            if name not in registry.entries():
                yield f"unknown {registry.kind} {name!r}; {did_you_mean(name, registry.entries())}"


def options_are_strict(subject: TaskSubject) -> Iterator[str]:
    """Its options refuse unknown keys."""
    options = {**json.loads(subject.options), "no_such_option": 1}
    with contextlib.suppress(ValidationError):
        subject.plugin.Config.model_validate_json(json.dumps(options))
        yield "the key 'no_such_option' was taken without a word; its Config must keep extra='forbid'"


def options_survive_json(subject: TaskSubject) -> Iterator[str]:
    """Its options are the same after a way through JSON."""
    config = subject.new().config
    again = type(config).model_validate_json(config.model_dump_json(), strict=True)
    if again != config:
        yield f"{config!r} came back as {again!r}; a trial's options travel as JSON"


def it_is_repeatable(subject: TaskSubject) -> Iterator[str]:
    """It gives the same examples at every call, after another prepare, and in another instance."""
    subject.task.prepare()
    again, other = read(subject.task), subject.new()
    other.prepare()
    others = read(other)
    for split in SPLITS:
        for words, found in (("when asked again", again[split]), ("from another instance", others[split])):
            if found != subject.splits[split]:
                yield f"{split} is different {words}; the order and the content of a split are fixed"


def splits_are_not_empty(subject: TaskSubject) -> Iterator[str]:
    """None of the three splits of its sample is empty."""
    for split, examples in subject.splits.items():
        if not examples:
            yield f"{split} has no example"


def ids_are_unique(subject: TaskSubject) -> Iterator[str]:
    """Ids are texts, and unique over the task."""
    seen: dict[str, str] = {}
    for split, examples in subject.splits.items():
        for example in examples:
            if not isinstance(example.id, str) or not example.id:
                yield f"{split} has the id {example.id!r}; allowed: text that is not empty"
            elif example.id in seen:
                yield f"id {example.id!r} is in {seen[example.id]} and again in {split}; one example, one id"
            seen[example.id] = split


def splits_share_no_file(subject: TaskSubject) -> Iterator[str]:
    """No file is in two splits."""
    seen: dict[Path, str] = {}
    for split, examples in subject.splits.items():
        for path in {path.resolve() for example in examples for _, path in example.files}:
            if path in seen:
                yield f"{path} is in {seen[path]} and in {split}; what is tested may not be trained on"
            seen[path] = split


def inputs_are_of_their_context(subject: TaskSubject) -> Iterator[str]:
    """Inputs are of known contexts: a file where a modality reads it, text where none does."""
    task = subject.task
    for where, example in subject.each():
        for context, value in example.inputs:
            if context not in task.contexts:
                yield f"{where}: an input of context {context!r}; {did_you_mean(str(context), task.contexts)}"
            elif context in task.modalities and not isinstance(value, Path):
                yield f"{where}: {context!r} is {value!r}; {task.modalities[context]} reads it, so it must be a Path"
            elif context in task.modalities and not Path(value).is_file():
                yield f"{where}: {value} is no file"
            elif context not in task.modalities and not isinstance(value, str):
                yield f"{where}: {context!r} is {value!r}; no modality reads it, so it must be a string"


def files_can_be_decoded(subject: TaskSubject) -> Iterator[str]:
    """The modality of every file decodes it."""
    for where, example in subject.each():
        for context, path in example.files:
            if subject.readers[context].load(path) is None:
                yield f"{where}: {path} was decoded to nothing"


def references_are_texts(subject: TaskSubject) -> Iterator[str]:
    """Every example has references, none of them empty."""
    for where, example in subject.each():
        references: Any = example.references
        if isinstance(references, str) or not references:
            yield f"{where}: references are {references!r}; one or more strings are needed"
        elif wrong := [text for text in references if not isinstance(text, str) or not text.strip()]:
            yield f"{where}: a reference is {wrong[0]!r}; allowed: text that is not empty"


def targets_are_known(subject: TaskSubject) -> Iterator[str]:
    """The context of every answer is known, and text."""
    text = [context for context in subject.task.contexts if context not in subject.task.modalities]
    for where, example in subject.each():
        if example.target is not None and example.target not in text:
            yield f"{where}: its target is {example.target!r}; {did_you_mean(str(example.target), text)}"


def augment_is_drawn(subject: TaskSubject) -> Iterator[str]:
    """What augment does depends on the generator alone, keeps the kind, and leaves the item itself as it was."""
    task, seen = subject.task, set()
    for _, example in subject.each():
        for context, path in example.files:
            if context in seen:
                continue
            seen.add(context)
            item, untouched = subject.readers[context].load(path), subject.readers[context].load(path)
            drawn = [task.augment(context, item, np.random.default_rng(seed)) for seed in (0, 0)]
            if not same(item, untouched):
                yield f"augment changed the {context} it was given; it must return a new one, or the old one as it was"
            elif not same(*drawn):
                yield f"augment made two things of one {context} and one seed; it may draw from `rng` alone"
            if type(drawn[0]) is not type(item):
                yield f"augment turned a {type(item).__name__} into a {type(drawn[0]).__name__}; the kind must stay"
            elif context not in task.augmented and not same(drawn[0], untouched):
                yield f"augment changes {context}, which `augmented` does not name: features would be kept, and it lost"


def members_have_shares(subject: TaskSubject) -> Iterator[str]:
    """Every example is of a member, and the members' shares of training draws add up to 1."""
    members = subject.task.members()
    sizes = Counter(example.member for example in subject.splits["train"])
    for where, example in subject.each():
        if example.member not in members:
            yield f"{where}: its member is {example.member!r}; {did_you_mean(example.member, members)}"
            return
    shares = subject.task.shares(sizes)
    if set(shares) != set(sizes) or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-9:
        yield f"shares of {dict(sizes)} are {dict(shares)}; one above 0 for each is needed, adding up to 1"


FIRST: tuple[Callable[[TaskSubject], Iterator[str]], ...] = (sample_gives_options, sample_can_be_read)
THEN: tuple[Callable[[TaskSubject], Iterator[str]], ...] = (
    contexts_are_distinct, names_are_registered, options_are_strict, options_survive_json, it_is_repeatable,
    splits_are_not_empty, ids_are_unique, splits_share_no_file, inputs_are_of_their_context, files_can_be_decoded,
    references_are_texts, targets_are_known, augment_is_drawn, members_have_shares,
)  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Whether two decoded items are equal, whatever they are made of."""
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
