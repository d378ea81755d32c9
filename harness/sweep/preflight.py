"""Checks before any trial starts: backbones, adapters, data, budgets, input files, folders."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import track

from harness.core.cursor import Cursor
from harness.core.errors import ProblemList, UserError
from harness.core.files import cache_folder
from harness.core.inside import check_no_links
from harness.core.naming import flatten
from harness.core.origin import during
from harness.core.search import Halving
from harness.core.weights import models_of
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.experiment.shared import distinct
from harness.model import assembly
from harness.model.backbones import build_empty, check_backbone, load_tokenizer, max_positions
from harness.model.build import Splits, choose_splits, compute_as, count_parameters, empty_model, order_of
from harness.model.compiled import check_compiler
from harness.model.components import empty_encoders, make_modalities, make_task, method_of
from harness.model.frame import frame_of
from harness.model.inputs import Inputs, Reader
from harness.model.on_disk import cache_of
from harness.model.turn import Turn
from harness.model.vision_language import kind_of, load_processor
from harness.price.disk import FeatureSpace
from harness.sweep.placement import per_worker, this_machine
from harness.sweep.ray_folder import check_length, temporary_folder
from tasks.base import Example
from tasks.mixture import Mixture


def check_shell() -> None:
    """Check that bash is on the PATH: Ray starts its workers with it, and without it waits forever.

    Raises:
        UserError: it is not.
    """
    if shutil.which("bash") is None:
        raise UserError(f"PATH={os.environ.get('PATH', '')}: bash not found; Ray needs it to start its workers")


def check_ray(address: str | None = None) -> None:
    """Check that Ray can start here: its temporary folder, the length of its sockets' paths, and its folder in HOME.

    Args:
        address: of a cluster that runs already.

    Raises:
        UserError: it cannot; the message names the environment variable.
    """
    ray = sys.modules.get("ray")
    if address or os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized()):
        return  # a cluster that runs already
    check_length()
    name, temporary = temporary_folder()
    _check_writable(temporary, f"{name}={temporary}: not writable", "Ray needs it; set RAY_TMPDIR to another folder")
    home = Path.home()
    if not (home / ".ray" / "auth_token").is_file():
        _check_writable(
            home / ".ray", f"HOME={home}: not writable", "Ray and other libraries keep files there; set HOME"
        )


def check_resources(resources: Resources, where: Cursor, address: str | None = None) -> None:
    """Check that this machine has what one trial asks for, where Ray will be started here.

    Args:
        resources: of a trial.
        where: location of the section.
        address: of a cluster that runs already; what it has is known once it is connected to.

    Raises:
        UserError: it has not.
    """
    ray = sys.modules.get("ray")
    if not (address or os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized())):
        per_worker(resources, [this_machine()], where)
        if resources.torch_compile:
            check_compiler()


def check_folder(folder: Path) -> None:
    """Create the folder and check that files can be written to it, and to no other one through it.

    Raises:
        UserError: they cannot.
    """
    check_no_links(folder)
    _check_writable(folder, f"{folder}: not writable", "choose another folder with --output")


def _check_writable(folder: Path, problem: str, hint: str) -> None:
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{problem}: {error.strerror or error}; {hint}") from error


def check_models(specs: Sequence[TrialSpec], resources: Resources | None = None) -> None:
    """Check every backbone: available, with an eos token, and fitting every adapter and its ``init_from``.

    Args:
        specs: of the trials.
        resources: for how the language models compute.

    Raises:
        UserError: one is not, or does not.
    """
    kinds = distinct(specs, "backbone", "fingerprints", "relative_to")
    for backbone in {(own := spec.pinned_backbone).model_dump_json(): own for spec in kinds}.values():
        check_backbone(backbone)
        if backbone.model is None:
            frame_of(load_tokenizer(backbone), backbone)
        else:
            Turn(load_processor(backbone), backbone)
        compute_as(build_empty(backbone), resources or Resources())
    for spec in distinct(specs, "backbone", "eval"):
        _check_generation(spec, resources or Resources())
    for spec in distinct(specs, "task", "backbone", "adapter"):
        count_parameters(spec)
    sources = "task", "backbone", "adapter", "fingerprints", "seed"
    for spec in distinct((spec for spec in specs if spec.adapter.init_from), *sources):
        assembly.check(spec, empty_model(spec, empty_encoders(spec)))


def _check_generation(spec: TrialSpec, resources: Resources) -> None:
    """Check that a model whose positions tell a grid is not asked for texts in a way that does not know them.

    Raises:
        UserError: it is.
    """
    if spec.backbone.model is None or not kind_of(spec.pinned_backbone)[0].grid:
        return
    wrong = {"eval.num_beams": spec.eval.num_beams > 1, "resources.zero_stage": resources.zero_stage == 3}
    for key in (key for key, is_wrong in wrong.items() if is_wrong):
        raise UserError(
            f"{key}: texts of {spec.backbone.model!r} are generated with positions that tell where a feature is in its "
            "picture, which neither beams nor ZeRO-3 know; allowed: num_beams: 1, zero_stage: 0, 1 or 2"
        )


def check_fingerprints(specs: Sequence[TrialSpec], where: str) -> None:
    """Check that it is known which weights every model has.

    Raises:
        UserError: the commit of a hub id could not be resolved.
    """
    for spec in distinct(specs, "backbone", "fingerprints"):
        for key, (name, _) in models_of(spec.backbone.model_dump()).items():
            if spec.fingerprints.get(key) is None:
                hint = "revision: COMMIT" if key == "language_model" else f"{name}@COMMIT"
                raise UserError(
                    f"{where}.{key}: {name!r}: its commit is neither in the hub's local cache nor could the hub be "
                    f"asked; connect to the hub, or set {hint} (40 hexadecimal digits)"
                )


def files_read(specs: Sequence[TrialSpec], run: Path) -> list[str]:
    """Files and folders that trials read, which every node of a cluster must see; of a folder's inputs only the first.

    Data that a task makes or downloads into the cache of a machine is not among them: each machine prepares its own.
    """
    found: list[Path] = list({path.parent: path for path in reversed(Inputs(run).paths)}.values())
    for spec in distinct(specs, "task", "backbone", "adapter"):
        backbone = spec.pinned_backbone
        found += [Path(name) for name in (backbone.language_model, *backbone.encoders.values()) if name.startswith("/")]
        found += [Path(source.trial) for source in spec.adapter.init_from.values()]
        task = make_task(spec)
        tasks = [task, *task.members().values()] if isinstance(task, Mixture) else [task]
        found += [path for one in tasks for path in _paths(one.config)]
        found += _paths(method_of(spec.adapter, spec.relative_to).config)
    cache = cache_folder().resolve()
    located = (path.resolve() for path in found)
    return list(dict.fromkeys(str(path) for path in located if path.exists() and not path.is_relative_to(cache)))


def _paths(value: Any) -> list[Path]:
    """All paths in options."""
    if isinstance(value, Path):
        return [value]
    if isinstance(value, BaseModel):
        value = list(vars(value).values())
    elif isinstance(value, Mapping):
        value = list(value.values())
    return [path for one in value for path in _paths(one)] if isinstance(value, list | tuple) else []


def check_inputs(
    specs: Sequence[TrialSpec], run: Path, console: Console, experiment: Experiment, address: str | None
) -> None:
    """Check all data of a run, and that encoders' features can be kept.

    Args:
        specs: of the trials.
        run: the run folder.
        console: for progress.
        experiment: of the trials.
        address: of a cluster that runs already.

    Raises:
        UserError: as in ``check_data`` and ``check_feature_cache``.
    """
    space = check_data(specs, run, console, experiment.halving)
    check_feature_cache(experiment.resources, space, address)


def check_data(specs: Sequence[TrialSpec], run: Path, console: Console, halving: Halving | None = None) -> FeatureSpace:
    """Prepare every task, check that there are enough examples that fit into the language model's positions, and decode
    every input file that will be used.

    Files are cached as checked in the run folder, and read again only when they change.

    Args:
        specs: of the trials.
        run: the run folder.
        console: for progress.
        halving: whose rungs must fit the budget's gradient accumulation.

    Returns:
        What the features of the files will take.

    Raises:
        UserError: data is missing, broken or not enough; the message names the file or the key.
    """
    wanted: dict[tuple[Path, str], Reader] = {}
    chosen: list[tuple[TrialSpec, Splits]] = []
    # Trials that differ only in the adapter use the same data.
    for spec in {_data_key(spec): spec for spec in specs}.values():
        task = make_task(spec)
        with during(f"preparation of task {spec.task.name}"):
            task.prepare()
        splits = choose_splits(spec, task)
        check_positions(spec, splits)
        chosen.append((spec, splits))
        if halving is not None:
            check_rungs(spec, halving, order_of(spec, task, splits.train).draws)
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
    space = FeatureSpace()
    for spec, splits in chosen:
        space.add(spec, splits)
    return space


def check_feature_cache(resources: Resources, space: FeatureSpace, address: str | None = None) -> None:
    """Check that encoders' features can be kept on disk, where trials run on this machine.

    Args:
        resources: of a trial.
        space: what the features will take.
        address: of a cluster that runs already; each of its nodes has a cache of its own.

    Raises:
        UserError: they cannot; the message says what would work.
    """
    cache = cache_of(resources)
    if cache is not None and not (address or os.environ.get("RAY_ADDRESS")):
        cache.check(space.size_bytes or 0)


def check_rungs(spec: TrialSpec, halving: Halving, draws: int) -> None:
    """Check that a trial has a complete optimizer step at every rung: a checkpoint has no accumulated gradients.

    Args:
        spec: of the trial.
        halving: of the experiment.
        draws: training items of an epoch.

    Raises:
        UserError: a rung is within a gradient accumulation.
    """
    batches = math.ceil(draws / spec.optimizer.per_device_train_batch_size)
    accumulation = spec.optimizer.gradient_accumulation_steps
    for rung in halving.rungs:
        if rung * batches % accumulation:
            raise UserError(
                f"search.halving.rungs: epoch {rung} ends after {rung * batches} batches, within a step of "
                f"gradient_accumulation_steps={accumulation}; allowed: epochs that end with a whole step"
            )


def _data_key(spec: TrialSpec) -> str:
    parts = [spec.task.model_dump(mode="json"), spec.budget.model_dump(), spec.eval.model_dump(), spec.seed]
    return json.dumps([*parts, spec.backbone.model_dump(), _prompt_positions(spec)])


def _prompt_positions(spec: TrialSpec) -> int:
    """The positions of soft prompts, which come before those of a row."""
    configs = [own.config for own in spec.adapter.choices if "soft_prompt" in own.method.split("+")]
    return max(
        (n for own in configs for key, n in flatten(own) if key.rpartition(".")[2] == "num_virtual_tokens"), default=0
    )


def check_positions(spec: TrialSpec, splits: Splits) -> None:
    """Check that the texts of every example fit into the positions of the language model.

    An encoded file counts as one position: how many it takes is known when it is encoded, and checked then.

    Raises:
        UserError: one does not fit.
    """
    limit = max_positions(build_empty(spec.pinned_backbone))
    if limit is None:
        return
    tokenizer = load_tokenizer(spec.pinned_backbone)
    budget, given = spec.budget, frame_of(tokenizer, spec.backbone).length + _prompt_positions(spec)

    def length(text: str, most: int, bound: bool) -> int:
        if bound:  # no tokenizer makes more tokens: tokenizing every text of a large data set would take minutes
            return min(2 * len(text.encode("utf-8", "surrogatepass")) + 2, most)
        return min(len(tokenizer(text, add_special_tokens=False)["input_ids"]), most)

    def positions(example: Example, bound: bool) -> int:
        texts = [value for _, value in example.inputs if isinstance(value, str)]
        row = given + len(example.files) + sum(length(text, budget.max_input_length, bound) for text in texts)
        target = max((length(text, budget.max_target_length, bound) for text in example.references), default=0) + 1
        return row + max(target, spec.eval.max_new_tokens - 1)

    for example in (*splits.train, *splits.validation, *splits.test):
        if positions(example, bound=True) <= limit:
            continue
        if (found := positions(example, bound=False)) > limit:
            raise UserError(
                f"task {spec.task.name}: example {example.id} takes {found} positions, but "
                f"{spec.backbone.language_model} has {limit} (max_position_embeddings); lower budget.max_input_length, "
                "budget.max_target_length or eval.max_new_tokens, or leave such examples out"
            )


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
