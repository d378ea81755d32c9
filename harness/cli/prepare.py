"""``harness prepare``: download or generate data; with ``--check``, read all of it and report every problem.

A trial reads only what its budget needs. The check reads every example and every file of a task, or of the tasks of an
experiment with its encoders, so that a corrupt file in a large data set is found before a long run fails on it.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text

from harness.check import task as task_checks
from harness.cli.plugins import parse_options
from harness.core import validation
from harness.core.cursor import Cursor
from harness.core.errors import ProblemList, UserError
from harness.core.files import digest_of
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.experiment.sections import TaskChoice
from harness.model.inputs import Reader
from results.leaderboard.format import ABSENT
from tasks.base import Example, Split, Task
from tasks.registry import MODALITIES, TASKS

if TYPE_CHECKING:
    from tasks.encoder import Encoder

SPLITS: tuple[Split, ...] = get_args(Split)
SHOWN = 100  # problems that are printed; if there are more, all of them are written to a file
_NAMED = 3  # files that a warning names
Splits = Mapping[Split, Sequence[Example]]

# The checks of a task's sample that its real data must pass too.
_CONTRACT: tuple[Callable[[task_checks.TaskSubject], Iterator[str]], ...] = (
    task_checks.splits_are_not_empty,
    task_checks.ids_are_unique,
    task_checks.inputs_are_of_their_context,
    task_checks.references_are_texts,
    task_checks.targets_are_known,
)


@dataclass(frozen=True)
class _Subject:
    """A task to prepare."""

    name: str
    task: Task
    readers: Mapping[str, Reader]  # by context
    specs: tuple[TrialSpec, ...] = ()  # the trials of the experiment on this task


@dataclass(frozen=True)
class _Finding:
    """The result of reading a file."""

    digest: str = ""  # SHA-256 of the content
    remark: str | None = None
    problem: str | None = None


def prepare(target: str, options: Sequence[str], check: bool, console: Console) -> None:
    """Prepare a task, or the tasks of an experiment, and print the sizes of their splits.

    Args:
        target: the name of a task, or an experiment file (``.yaml``), which may load plugins.
        options: options of the named task, such as ``root=/data/coco``.
        check: read every example and every file, and print all problems.
        console: prints the result.

    Raises:
        UserError: the task or experiment is unknown, or its options or data are wrong. With ``check``, all problems
            of the data have been printed, and the message only has their number.
    """
    subjects = _subjects(target, options)
    if check:
        _check(subjects, target, console)
        return
    for subject in subjects:
        with console.status(f"Preparing {escape(subject.name)}"):
            subject.task.prepare()
            splits: Splits = {split: subject.task.examples(split) for split in SPLITS}
        console.print(_table(subject, splits))


def _check(subjects: Sequence[_Subject], target: str, console: Console) -> None:
    """Read all data of some tasks, and print what was found.

    Raises:
        UserError: there are problems; they have been printed.
    """
    known: dict[tuple[str, Path], _Finding] = {}
    problems = ProblemList()
    tables, remarks = [], []
    for subject in subjects:
        with console.status(f"Preparing {escape(subject.name)}"):
            splits = _examples(subject, problems)
        findings = _read_files(subject, splits, known, console)
        for finding in findings.values():
            if finding.problem:
                problems.add(finding.problem)
        remarks += [*_leaks(splits, findings), *_conversions(findings), *_longest(splits)]
        if splits:
            tables.append(_table(subject, splits))
    messages = list(dict.fromkeys(problems.messages))
    _print_problems(messages, Path(f"{Path(target).stem}-problems.txt"), console)
    for remark in dict.fromkeys(remarks):
        console.print(Text(remark), soft_wrap=True)
    for table in tables:
        console.print(table)
    if messages:
        raise UserError(f"{target}: {len(messages):,} problem{'s' if len(messages) > 1 else ''}, listed above")
    console.print(Text("no problems found", style="green"))


def _subjects(target: str, options: Sequence[str]) -> list[_Subject]:
    if Path(target).suffix not in {".yaml", ".yml"}:
        return [_named(target, options)]
    if options:
        raise UserError(
            f"--set {options[0]}: the options of an experiment are in its file; --set is for the name of a task"
        )
    groups: dict[str, list[TrialSpec]] = {}
    for spec in expand(Experiment.from_yaml(Path(target))):
        groups.setdefault(spec.task.model_dump_json(), []).append(spec)
    choices = [group[0].task for group in groups.values()]
    return [_of_experiment(_label(group[0].task, choices), group) for group in groups.values()]


def _named(name: str, options: Sequence[str]) -> _Subject:
    task_class = TASKS.load(TASKS.find(name).target)
    values = parse_options(options)
    task: Task = task_class(validation.check(task_class.Config, values, Cursor(path=("--set",))))
    names = set(task.modalities.values())
    by_modality = {m: Reader(m, MODALITIES.load(MODALITIES.find(m).target)()) for m in names}
    return _Subject(name, task, {context: by_modality[m] for context, m in task.modalities.items()})


def _label(choice: TaskChoice, choices: Sequence[TaskChoice]) -> str:
    """The name of the task, and the options that differ between tasks of this name."""
    others = [other.config for other in choices if other.name == choice.name]
    differing = [key for key, value in choice.config.items() if any(other.get(key) != value for other in others)]
    return " ".join([choice.name, *(f"{key}={choice.config[key]}" for key in differing)])


def _of_experiment(name: str, specs: Sequence[TrialSpec]) -> _Subject:
    from harness.model import components  # not above: it needs torch

    task = components.make_task(specs[0])
    modalities = components.make_modalities(specs[0])
    encoders: dict[str, dict[str, Encoder]] = {m: {} for m in modalities}
    for spec in {spec.backbone.model_dump_json(): spec for spec in specs}.values():
        for m, encoder in components.empty_encoders(spec).items():
            encoders[m][spec.backbone.encoders[m]] = encoder
    by_modality = {
        m: Reader(" ".join([m, *encoders[m]]), modality, tuple(encoders[m].values()))
        for m, modality in modalities.items()
    }
    return _Subject(name, task, {context: by_modality[m] for context, m in task.modalities.items()}, tuple(specs))


def _examples(subject: _Subject, problems: ProblemList) -> Splits:
    """The examples of the splits that could be read; what is wrong is added to ``problems``."""
    splits: dict[Split, Sequence[Example]] = {}
    try:
        subject.task.prepare()
    except UserError as error:
        problems.add(error)
    for split in SPLITS:
        try:
            splits[split] = subject.task.examples(split)
        except UserError as error:
            problems.add(error)
    checked = task_checks.TaskSubject(type(subject.task), subject.name, Path())
    checked.task, checked.splits = subject.task, {split: list(examples) for split, examples in splits.items()}
    for check in _CONTRACT:
        for message in check(checked):
            problems.add(f"{subject.name}: {message}")
    if subject.specs and len(splits) == len(SPLITS):
        _check_budgets(subject, problems)
    return splits


def _check_budgets(subject: _Subject, problems: ProblemList) -> None:
    """Check that every split has as many examples as the experiment needs."""
    from harness.model.build import choose_splits

    sizes = {(s.budget.examples, s.eval.validation_examples, s.eval.test_examples): s for s in subject.specs}
    for spec in sizes.values():
        try:
            choose_splits(spec, subject.task)
        except UserError as error:
            problems.add(error)


def _read_files(
    subject: _Subject, splits: Splits, known: dict[tuple[str, Path], _Finding], console: Console
) -> dict[Path, _Finding]:
    """Read the files of all examples once each; ``known`` holds the results of earlier tasks."""
    readers = {
        path: subject.readers[context]
        for examples in splits.values()
        for example in examples
        for context, path in example.files
        if context in subject.readers
    }
    new = [path for path, reader in readers.items() if (reader.name, path) not in known]
    if new:
        title = f"Reading every file of {escape(subject.name)}"
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(lambda path: _finding(readers[path], path), new)
            for path, finding in zip(new, track(found, title, len(new), console=console, transient=True), strict=True):
                known[readers[path].name, path] = finding
    return {path: known[reader.name, path] for path, reader in readers.items()}


def _finding(reader: Reader, path: Path) -> _Finding:
    try:
        remark = reader.read(path)
        return _Finding(digest_of(path), remark)
    except UserError as error:
        return _Finding(problem=str(error))


def _leaks(splits: Splits, findings: Mapping[Path, _Finding]) -> Iterator[str]:
    """A warning for every pair of splits that share files, compared by content."""
    by_split = {
        split: {findings[path].digest: path for example in examples for _, path in example.files if path in findings}
        for split, examples in splits.items()
    }
    for one, other in itertools.combinations(by_split, 2):
        common = [digest for digest in by_split[one] if digest and digest in by_split[other]]
        if common:
            pairs = "; ".join(f"{by_split[one][digest]} and {by_split[other][digest]}" for digest in common[:_NAMED])
            rest = f"; and {len(common) - _NAMED:,} more" if len(common) > _NAMED else ""
            yield (
                f"warning: {_files(len(common))} of {one} with the same content in {other}: {pairs}{rest}. "
                "Scores on data that was trained on are not meaningful."
            )


def _conversions(findings: Mapping[Path, _Finding]) -> Iterator[str]:
    """The conversions that decoding made, each with its number of files and the first one."""
    remarks = {path: finding.remark for path, finding in findings.items() if finding.remark}
    for remark, count in Counter(remarks.values()).most_common():
        first = next(path for path, other in remarks.items() if other == remark)
        yield f"{_files(count)}: {remark} ({first}{', …' if count > 1 else ''})"


def _files(count: int) -> str:
    return f"{count:,} file" if count == 1 else f"{count:,} files"


def _longest(splits: Splits) -> Iterator[str]:
    """The longest reference and the longest text input, which ``budget`` may have to truncate."""
    examples = [example for found in splits.values() for example in found]
    texts = {
        "reference": [(len(text), e.id) for e in examples for text in e.references],
        "text input": [(len(part.value), e.id) for e in examples for part in e.inputs if isinstance(part.value, str)],
    }
    for what, lengths in texts.items():
        if lengths:
            length, example_id = max(lengths)
            yield f"longest {what}: {length:,} characters, of example {example_id!r}"


def _print_problems(messages: Sequence[str], file: Path, console: Console) -> None:
    for number, message in enumerate(messages[:SHOWN], 1):
        console.print(Text(f"{number}. {message}"), soft_wrap=True)
    if len(messages) > SHOWN:
        file.write_text("".join(f"{message}\n" for message in messages), encoding="utf-8")
        console.print(Text(f"… and {len(messages) - SHOWN:,} more; all of them: {file.absolute()}"), soft_wrap=True)


def _table(subject: _Subject, splits: Splits) -> Table:
    """A row for each split that could be read."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=Text(subject.name), title_justify="left")
    for heading in ("split", "examples", "references each", "files", "contexts"):
        table.add_column(heading, justify="left" if heading in ("split", "contexts") else "right")
    for split, examples in splits.items():
        references = sum(len(example.references) for example in examples)
        files = {path for example in examples for _, path in example.files}
        targets = {example.target or subject.task.contexts[-1] for example in examples}
        inputs = {context for example in examples for context, _ in example.inputs}
        before, answers = (
            ", ".join(context for context in subject.task.contexts if context in found) for found in (inputs, targets)
        )
        each = f"{references / len(examples):.3g}" if examples else ABSENT
        table.add_row(split, f"{len(examples):,}", each, f"{len(files):,}", Text(f"{before} → {answers}"))
    return table
