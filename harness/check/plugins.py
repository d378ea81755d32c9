"""``harness check``: tests the plugins of a package or a file against their contracts.

The checks are in ``harness.check.task``, ``harness.check.modality``, ``harness.check.metric`` and
``harness.check.adapter``; the tests in ``tests/contracts`` run the same checks on every registered plugin.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from adapters.registry import ADAPTERS
from harness.check import adapter as adapter_checks
from harness.check import encoder as encoder_checks
from harness.check import metric as metric_checks
from harness.check import modality as modality_checks
from harness.check import task as task_checks
from harness.check.adapter import AdapterSubject
from harness.check.encoder import EncoderSubject
from harness.check.metric import MetricSubject
from harness.check.modality import ModalitySubject
from harness.check.process import another_process_agrees
from harness.check.task import TaskSubject
from harness.core.errors import Problems, UserError, did_you_mean
from harness.core.registry import Entry, Registry, add_file
from tasks.registry import ENCODERS, METRICS, MODALITIES, TASKS

_SHOWN = 5  # problems of one check
_FILES = 4  # that a modality is tested on
_REGISTRIES: tuple[Registry[Any], ...] = (TASKS, MODALITIES, ENCODERS, METRICS, ADAPTERS)
S = TypeVar("S", TaskSubject, ModalitySubject, MetricSubject, AdapterSubject)
Check = Callable[[S], Iterator[str]]


@dataclass(frozen=True)
class Result:
    """Result of one check; ``problems`` is None if it was not run because a check it depends on failed."""

    promise: str
    problems: tuple[str, ...] | None


def run_checks(first: Sequence[Check[S]], then: Sequence[Check[S]], subject: S) -> Iterator[Result]:
    """Run the checks of one plugin; those of ``then`` only if those of ``first`` pass."""
    sound = True
    for check in first:
        problems = problems_of(check, subject)
        sound = sound and not problems
        yield Result(promise(check), problems)
    for check in then:
        yield Result(promise(check), problems_of(check, subject) if sound else None)


def promise(check: Callable[..., Any]) -> str:
    """What a check requires: the first line of its docstring."""
    return str(check.__doc__).partition("\n")[0].rstrip(".")


def problems_of(check: Check[S], subject: S) -> tuple[str, ...]:
    """The problems that a check finds; an exception of the plugin is one of them."""
    found: list[str] = []
    try:
        found += check(subject)
    except (Exception, SystemExit) as error:  # third-party code
        found.append(_describe(error, subject.plugin))
    return tuple(found)


def _describe(error: BaseException, plugin: type) -> str:
    """The type of an exception, the first line of its message, and the line of the plugin that raised it."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}; found {first['input']!r}"
    else:
        text = error.messages[0] if isinstance(error, Problems) else str(error)
        message = text.strip().partition("\n")[0]
    source = Path(inspect.getfile(plugin))
    source = source.parent if (source.parent / "__init__.py").exists() else source
    frames = traceback.extract_tb(error.__traceback__)
    # The harness calls the plugin, which calls libraries: show the last frame in the plugin.
    place = ([frame for frame in frames if Path(frame.filename).is_relative_to(source)] or frames)[-1]
    return f"{type(error).__name__}: {message} ({place.filename}:{place.lineno})"


class Samples:
    """The samples of all registered tasks, written when needed. Modalities and metrics are tested on them.

    Args:
        folder: where they are written.
        first: tasks that are tried before all others.
    """

    def __init__(self, folder: Path, first: Sequence[Entry] = ()) -> None:
        self.folder = folder
        self._entries = list(dict.fromkeys((*first, *TASKS.entries().values())))
        self._subjects: dict[str, TaskSubject] = {}

    def of(self, entry: Entry) -> TaskSubject:
        """A task on its sample.

        Raises:
            UserError: the task cannot be imported.
        """
        if entry.target not in self._subjects:
            folder = self.folder / f"{len(self._subjects)}-{entry.name}"
            task_class = TASKS.load(entry.target)
            folder.mkdir(parents=True)
            self._subjects[entry.target] = TaskSubject(task_class, entry.target, folder)
        return self._subjects[entry.target]

    def files(self, modality: str) -> list[Path]:
        """Some files for a modality, from the first task that has any."""
        for subject in self._with("modalities", modality):
            contexts = {context for context, name in subject.task.modalities.items() if name == modality}
            parts = (part for _, example in subject.each() for part in example.files)
            if files := dict.fromkeys(path for context, path in parts if context in contexts):
                return list(files)[:_FILES]
        return []

    def references(self, metric: str) -> Mapping[str, Sequence[str]]:
        """References by example id, from the first task that uses the metric; a few sentences if none does."""
        for subject in self._with("metrics", metric):
            references = {e.id: e.references for split in ("validation", "test") for e in subject.splits[split]}
            if len(set(references.values())) > 1:
                return references
        return metric_checks.REFERENCES

    def _with(self, attribute: str, name: str) -> Iterator[TaskSubject]:
        for entry in self._entries:
            try:
                subject = self.of(entry)
                # From the class where it is set there, which saves reading most samples; else from its options.
                named = getattr(subject.plugin, attribute, None) or getattr(subject.task, attribute)
                if name not in (named.values() if isinstance(named, Mapping) else named):
                    continue
                _ = subject.splits
            except Exception:  # noqa: S112 - errors of other plugins are not reported here
                continue
            yield subject


def check_entry(registry: Registry[Any], entry: Entry, samples: Samples, folder: Path) -> Iterator[Result]:
    """Run all checks of one plugin.

    Args:
        registry: the registry of the plugin.
        entry: the plugin.
        samples: the samples of the registered tasks.
        folder: an empty folder for files that checks write.

    Raises:
        UserError: the plugin cannot be imported.
    """
    plugin = registry.load(entry.target)
    if registry is TASKS:
        then = (*task_checks.THEN, another_process_agrees)
        yield from run_checks(task_checks.FIRST, then, samples.of(entry))
    elif registry is MODALITIES:
        modality = ModalitySubject(plugin, samples.files(entry.name), folder)
        yield from run_checks(modality_checks.FIRST, modality_checks.THEN, modality)
    elif registry is ENCODERS:
        encoder = EncoderSubject(plugin, samples.files(plugin.modality), folder)
        yield from run_checks(encoder_checks.FIRST, encoder_checks.THEN, encoder)
    elif registry is ADAPTERS:
        method = AdapterSubject(plugin, entry.name, folder)
        yield from run_checks(adapter_checks.FIRST, adapter_checks.THEN, method)
    else:
        metric = MetricSubject(plugin, samples.references(entry.name))
        yield from run_checks(metric_checks.FIRST, metric_checks.THEN, metric)


def check_plugins(target: str, console: Console) -> bool:
    """Test the plugins of a package or a file against their contracts, and print the results.

    Args:
        target: name of an installed distribution or of a package in it, or the path of a Python file.
        console: where to print.

    Returns:
        Whether every check passed.

    Raises:
        UserError: there is no such package or file, or it registers no plugins.
    """
    checked = _entries_of(target)
    results: list[Result] = []
    with TemporaryDirectory(prefix="harness-check-") as folder, _cache_in(Path(folder)):
        samples = Samples(Path(folder) / "samples", [entry for registry, entry in checked if registry is TASKS])
        for number, (registry, entry) in enumerate(checked):
            console.print(Text.assemble((f"{registry.kind} {entry.name}", "bold"), f"  {entry.origin}, {entry.target}"))
            own = Path(folder) / str(number)
            own.mkdir()
            for result in _results(registry, entry, samples, own):
                _print(result, console)
                results.append(result)
    failed, skipped = sum(bool(r.problems) for r in results), sum(r.problems is None for r in results)
    counts = f"{len(results) - failed - skipped} checks passed, {failed} failed"
    console.print(counts + (f", {skipped} not run" if skipped else ""), highlight=False)
    return not failed


def _results(registry: Registry[Any], entry: Entry, samples: Samples, folder: Path) -> Iterator[Result]:
    try:
        yield from check_entry(registry, entry, samples, folder)
    except UserError as error:
        yield Result("It can be imported and has the right base class", (str(error).partition("\n")[0],))


def _entries_of(target: str) -> list[tuple[Registry[Any], Entry]]:
    if target.endswith(".py"):
        path = Path(target).expanduser().resolve()
        add_file(path, "harness check", _REGISTRIES)
        return [(r, entry) for r in _REGISTRIES for entry in r.entries().values() if entry.origin == str(path)]
    wanted = _plain(target)
    found, names = [], set()
    for registry in _REGISTRIES:
        for entry in registry.entries().values():
            distribution, package = entry.distribution, entry.target.partition(":")[0].partition(".")[0]
            names.add(distribution)
            if wanted in (_plain(distribution), _plain(package)):
                found.append((registry, entry))
    if not found:
        raise UserError(
            f"harness check: no installed package {target!r} registers plugins; {did_you_mean(target, names)}, "
            "or the path of a .py file"
        )
    return found


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Use a temporary cache for what tasks generate or download."""
    before = os.environ.get("HARNESS_CACHE")
    os.environ["HARNESS_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["HARNESS_CACHE"]
        else:
            os.environ["HARNESS_CACHE"] = before


def _print(result: Result, console: Console) -> None:
    if result.problems is None:
        console.print(Text(f"  - {result.promise}: not run, a check before it failed", "dim"), soft_wrap=True)
        return
    mark, style = ("✗", "red") if result.problems else ("✓", "green")
    console.print(Text.assemble("  ", (mark, style), f" {result.promise}"), soft_wrap=True)
    rest = len(result.problems) - _SHOWN
    for problem in [*result.problems[:_SHOWN], *([f"… and {rest} more"] if rest > 0 else [])]:
        console.print(Text(f"      {problem}"), soft_wrap=True)
