"""Checks before any trial starts: backbones, adapters, data, budgets, input files, folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

from harness.core.errors import ProblemList, UserError
from harness.core.record import MetricInfo
from harness.core.weights import models_of
from harness.experiment.plan import TrialSpec
from harness.model import assembly
from harness.model.backbones import check_backbone
from harness.model.build import choose_splits, count_parameters, empty_model
from harness.model.components import empty_encoders, make_modalities, make_task, method_of
from harness.model.inputs import Inputs, Reader
from harness.trial.scores import metric_name
from tasks.registry import METRICS


def metrics_of(specs: Sequence[TrialSpec]) -> tuple[MetricInfo, ...]:
    """The metrics of the trials: perplexity, with the right and with the wrong inputs, and those of the tasks."""
    infos = [
        MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False),
        MetricInfo(name="perplexity_wrong_input", label="Perplexity, wrong input", higher_is_better=False),
    ]
    for task in {spec.task.model_dump_json(): spec.task for spec in specs}.values():
        for member, metrics in task.metrics.items():
            prefix = f"{member}: " if member else ""
            if member:
                name, label = metric_name(member, "perplexity"), f"{prefix}Perplexity"
                infos.append(MetricInfo(name=name, label=label, higher_is_better=False))
            for metric in (METRICS.load(plugin.target) for plugin in metrics.values()):
                infos += [
                    MetricInfo(
                        name=metric_name(member, name),
                        label=f"{prefix}{label}",
                        higher_is_better=name not in metric.lower_is_better,
                        corpus=metric.corpus.get(name, "mean"),
                    )
                    for name, label in metric.labels.items()
                ]
    return tuple({info.name: info for info in infos}.values())


def check_shell() -> None:
    """Check that bash is on the PATH: Ray starts its workers with it, and without it waits forever.

    Raises:
        UserError: it is not.
    """
    if shutil.which("bash") is None:
        raise UserError(f"PATH={os.environ.get('PATH', '')}: bash not found; Ray needs it to start its workers")


def check_stages(specs: Sequence[TrialSpec], where: str) -> None:
    """Check that the training stages of every method fit into the budget's epochs.

    Raises:
        UserError: they do not.
    """
    for spec in {spec.model_dump_json(include={"adapter", "budget"}): spec for spec in specs}.values():
        try:
            method_of(spec.adapter).stages(spec.budget.epochs)
        except UserError as error:
            raise UserError(f"{where}: {spec.adapter.label}: {error}") from None


def check_folder(folder: Path) -> None:
    """Create the folder and check that files can be written to it.

    Raises:
        UserError: they cannot.
    """
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: not writable: {error.strerror or error}; choose another folder with --output"
        ) from error


def check_models(specs: Sequence[TrialSpec]) -> None:
    """Check that every backbone is available, and that every adapter fits its language model and its ``init_from``.

    Raises:
        UserError: one is not, or does not.
    """
    for backbone in {spec.backbone.model_dump_json(): spec.backbone for spec in specs}.values():
        check_backbone(backbone)
    for spec in {spec.model_dump_json(include={"task", "backbone", "adapter"}): spec for spec in specs}.values():
        count_parameters(spec)
    for spec in specs:
        if spec.adapter.init_from:
            assembly.check(spec, empty_model(spec, empty_encoders(spec)))


def check_fingerprints(specs: Sequence[TrialSpec], where: str) -> None:
    """Check that it is known which weights every model has.

    Raises:
        UserError: the commit of a hub id could not be resolved.
    """
    for spec in specs:
        for key, (name, _) in models_of(spec.backbone.model_dump()).items():
            if spec.fingerprints.get(key) is None:
                hint = "revision: COMMIT" if key == "language_model" else f"{name}@COMMIT"
                raise UserError(
                    f"{where}.{key}: {name!r}: its commit is neither in the hub's local cache nor could the hub be "
                    f"asked; connect to the hub, or set {hint} (40 hexadecimal digits)"
                )


def check_data(specs: Sequence[TrialSpec], run: Path, console: Console) -> None:
    """Prepare every task, check that there are enough examples, and decode every input file that will be used.

    Files are cached as checked in the run folder, and read again only when they change.

    Raises:
        UserError: data is missing, broken or not enough; the message names the file or the key.
    """
    wanted: dict[tuple[Path, str], Reader] = {}
    # Trials that differ only in the adapter use the same data.
    for spec in {_data_key(spec): spec for spec in specs}.values():
        task = make_task(spec)
        task.prepare()
        splits = choose_splits(spec, task)
        encoders = empty_encoders(spec)
        readers = {
            name: Reader(f"{name} {spec.task.modalities[name].id} {spec.backbone.encoders[name]}", m, (encoders[name],))
            for name, m in make_modalities(spec).items()
        }
        for example in (*splits.train, *splits.validation, *splits.test):
            for context, path in example.files:
                reader = readers[task.modalities[context]]
                wanted[path, reader.name] = reader
    _read_all([(path, reader) for (path, _), reader in wanted.items()], Inputs(run), console)


def _data_key(spec: TrialSpec) -> str:
    parts = [spec.task.model_dump(mode="json"), spec.budget.examples, spec.eval.model_dump(), spec.seed]
    return json.dumps([*parts, spec.backbone.encoders])


def _read_all(wanted: Sequence[tuple[Path, Reader]], inputs: Inputs, console: Console) -> None:
    new = [(path, reader) for path, reader in wanted if not inputs.is_read(path, reader)]
    if not new:
        return
    problems = ProblemList()

    def read(item: tuple[Path, Reader]) -> None:
        try:
            inputs.read(*item)
        except UserError as error:
            problems.add(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in track(pool.map(read, new), "Checking input files", len(new), console=console, transient=True):
            pass
    inputs.save()
    problems.raise_any()
