"""Loads experiments, from a YAML file or from the same sections in Python; a list value is an axis of the grid.

Errors are found here, before any compute, and reported with their location: unknown keys (with the nearest name), wrong
types, empty axes, unknown plugins.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

from pydantic import Field

from harness.core import hub
from harness.core.cursor import Cursor
from harness.core.errors import UserError, did_you_mean
from harness.core.paths import check_model, locate, locate_model
from harness.core.registry import add_file
from harness.core.search import Halving
from harness.core.source import read_yaml, write_yaml
from harness.core.validation import check
from harness.experiment.axes import NO_AXIS, axes
from harness.experiment.options import REGISTRIES, choose_adapters, choose_task, task_axes
from harness.experiment.search import SearchDefaults, check_equal, check_halving
from harness.experiment.sections import (
    AdapterChoice,
    Backbone,
    Budget,
    Evaluation,
    Limits,
    Optimizer,
    Resources,
    Section,
    TaskChoice,
    Tracking,
)
from tasks.registry import ENCODERS, MODALITIES

_NO_AXIS_OF_RUN = "it limits the whole run, so it has no axis"


class Sections(TypedDict, total=False):
    """The sections of an experiment; ``task`` and ``adapters`` are required."""

    name: str
    task: str | Mapping[str, Any]
    adapters: Sequence[Mapping[str, Any]]
    backbone: Mapping[str, Any]
    budget: Mapping[str, Any]
    seeds: Sequence[int]
    optimizer: Mapping[str, Any]
    search: Mapping[str, Any]
    eval: Mapping[str, Any]
    resources: Mapping[str, Any]
    tracking: Mapping[str, Any]
    plugins: Sequence[str | Path]


class _TopLevel(Section):
    """The top-level keys; sections are checked one by one after their axes are expanded.

    The examples are for messages where something else is found.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    task: Annotated[str | dict[str, Any], Field(examples=[{"name": "scenes"}])]
    adapters: Annotated[list[dict[str, Any]], Field(min_length=1, examples=[{"method": "lora"}])]
    backbone: dict[str, Any] = Field(default_factory=dict, examples=[{"language_model": "builtin/tiny-llama"}])
    budget: dict[str, Any] = Field(default_factory=dict, examples=[{"examples": 1000}])
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0], examples=[[0, 1]]
    )
    optimizer: dict[str, Any] = Field(default_factory=dict, examples=[{"learning_rate": 1e-3}])
    search: dict[str, Any] = Field(default_factory=dict, examples=[{"learning_rate": [1e-3, 3e-3]}])
    eval: dict[str, Any] = Field(default_factory=dict, examples=[{"test_examples": 1000}])
    resources: dict[str, Any] = Field(default_factory=dict, examples=[{"workers": 1}])
    tracking: dict[str, Any] = Field(default_factory=dict, examples=[{"mlflow_uri": "http://localhost:5000"}])
    plugins: list[str] = Field(default_factory=list)  # Python files


class Experiment:
    """A validated experiment; each plural attribute is an expanded axis of the grid.

    ``Experiment(task="scenes", adapters=[{"method": "lora", "rank": [4, 16]}], budget={"examples": 64})`` takes the
    sections and keys of a YAML file, with the same checks; a list is an axis here too. ``Experiment.from_yaml(path)``
    reads a file. Relative paths start from the folder of the file, or, in Python, from the current folder.

    Attributes:
        name: of the run folder; default: the name of the file, or ``experiment``.
        text: YAML that describes the same experiment.
        file: the file it was read from; None if built in Python.
        folder: the absolute folder that relative paths start from.
        top: cursor of the top level, from which the locations in messages are made.
        adapters: one tuple for each task, because groupings refer to the task's contexts.
        gpu_hours: of all trials together, after which the run ends; None: no limit.
        halving: of the learning rates of every row; None: every one is trained to the end.

    Raises:
        UserError: the experiment is invalid; the message says where, what was found and what is allowed.
    """

    name: str
    text: str
    file: Path | None
    folder: Path
    top: Cursor
    tasks: tuple[TaskChoice, ...]
    backbones: tuple[Backbone, ...]
    adapters: tuple[tuple[AdapterChoice, ...], ...]
    budgets: tuple[Budget, ...]
    gpu_hours: float | None
    plugins: tuple[Path, ...]
    seeds: tuple[int, ...]
    optimizers: tuple[Optimizer, ...]
    halving: Halving | None
    evaluation: Evaluation
    resources: Resources
    tracking: Tracking

    def __init__(self, **sections: Unpack[Sections]) -> None:
        plain = _plain(dict(sections))
        self.file = None
        self._read(plain, Cursor(), Path.cwd())
        self.text = write_yaml(plain)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Experiment:
        """Read and check an experiment file.

        Raises:
            UserError: the experiment is invalid; the message says where, what was found and what is allowed.
        """
        path = Path(path)
        content, top = read_yaml(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: not a mapping; allowed keys: {', '.join(_TopLevel.model_fields)}")
        experiment = cls.__new__(cls)
        experiment.file, experiment.text = path, path.read_text(encoding="utf-8")
        experiment._read(content, top, path.parent.absolute())
        return experiment

    def _read(self, content: Mapping[str, Any], top: Cursor, folder: Path) -> None:
        given = check(_TopLevel, content, top, hint=NO_AXIS)
        if len(set(given.seeds)) != len(given.seeds):
            raise UserError(f"{top / 'seeds'}: a seed is given twice: {given.seeds}")
        self.plugins = ()
        for number, plugin in enumerate(given.plugins):
            here = top / "plugins" / number
            try:
                self.plugins += (locate(plugin, folder, explain=True),)
                add_file(self.plugins[-1], str(here), REGISTRIES)
            except ValueError as error:
                raise UserError(f"{here}: {error}") from None
        self.top, self.folder = top, folder
        self.name = given.name or (self.file.stem if self.file else "experiment")
        self.evaluation = check(Evaluation, given.eval, top / "eval", hint=NO_AXIS)
        task = {"name": given.task} if isinstance(given.task, str) else given.task
        self.tasks = tuple(choose_task(v, self.evaluation.metrics, top, folder) for v in task_axes(task, top / "task"))
        self.backbones = tuple(_backbones(given.backbone, top / "backbone", folder))
        searches = check(SearchDefaults, given.search, top / "search")
        found = [list(choose_adapters(given.adapters, t, top / "adapters", folder, searches)) for t in self.tasks]
        self.adapters = tuple(tuple(choice for _, choice in own) for own in found)
        limits = {key: value for key, value in given.budget.items() if key in Limits.model_fields}
        self.gpu_hours = check(Limits, limits, top / "budget", hint=_NO_AXIS_OF_RUN).gpu_hours
        budget = {key: value for key, value in given.budget.items() if key not in limits}
        self.budgets = tuple(
            check(Budget, v, top / "budget", also=Limits.model_fields) for v in axes(budget, top / "budget")
        )
        self.seeds = tuple(given.seeds)
        self.optimizers = tuple(
            check(Optimizer, v, top / "optimizer") for v in axes(given.optimizer, top / "optimizer")
        )
        self.resources = check(Resources, given.resources, top / "resources", hint=NO_AXIS)
        self.tracking = check(Tracking, given.tracking, top / "tracking", hint=NO_AXIS)
        self._check_learning_rates()
        self._check_encoders()
        self.backbones = tuple(map(self._with_checked_options, self.backbones))
        self.halving = searches.halving
        if given.search or any("search" in entry for entry in given.adapters):
            for own in found:
                check_equal(own, self.optimizers, top / "adapters")
        if self.halving is not None:
            choices = (choice for own in self.adapters for choice in own)
            check_halving(self.halving, choices, self.budgets, top / "search" / "halving")

    def _check_encoders(self) -> None:
        used = {modality for task in self.tasks for modality in task.modalities}
        for modality in {modality for backbone in self.backbones for modality in backbone.encoders}:
            if modality not in used:
                where, near = self.top / "backbone" / "encoders" / modality, did_you_mean(modality, used)
                raise UserError(f"{where}: no task of this experiment reads {modality!r}; {near}")
        for modality, name in {pair for backbone in self.backbones for pair in backbone.encoders.items()}:
            of = ENCODERS.load(ENCODERS.find(name).target).modality if name in ENCODERS.entries() else modality
            if of != modality:
                where = self.top / "backbone" / "encoders" / modality
                raise UserError(f"{where}: {name!r} is an encoder of {of!r}; allowed: one of {modality!r}")

    def _with_checked_options(self, backbone: Backbone) -> Backbone:
        """The backbone with the options of its encoders as their modalities know them, without defaults."""
        plugins = {name: plugin for task in self.tasks for name, plugin in task.modalities.items()}
        found = {}
        for modality, given in backbone.encoder_options.items():
            where, name = self.top / "backbone" / "encoders" / modality, backbone.encoders[modality]
            if given and (hub.is_builtin(name) or name in ENCODERS.entries()):
                raise UserError(
                    f"{where / next(iter(given))}: {name!r} has no options; allowed: model alone, or a folder or hub id"
                )
            known = MODALITIES.load(plugins[modality].target).EncoderConfig
            found[modality] = check(known, given, where, also=("model",)).model_dump(exclude_defaults=True)
        kept = {modality: own for modality, own in found.items() if own}
        return backbone.model_copy(update={"encoder_options": kept})

    def _check_learning_rates(self) -> None:
        without = [c.label for choices in self.adapters for c in choices if c.learning_rate is None and not c.search]
        if without and any(optimizer.learning_rate is None for optimizer in self.optimizers):
            raise UserError(
                f"{self.top / 'optimizer' / 'learning_rate'}: no learning rate for "
                f"{', '.join(dict.fromkeys(without))}; set optimizer.learning_rate, or learning_rate in the adapter"
            )


def _plain(value: Any) -> Any:
    """The value as YAML represents it: tuples and ranges as lists, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


_OF_PARTS = (
    *("language_model", "encoders", "start_token"),
    *("projector", "projector_dropout", "projector_boundary_tokens", "projector_positions"),
)


def _check_model_keys(variant: Mapping[str, Any], where: Cursor) -> None:
    """Check that keys of a backbone that is put together are not given with a whole model, nor the other way.

    Raises:
        UserError: one is.
    """
    if variant.get("model") is None:
        if "connector" in variant:
            raise UserError(f"{where / 'connector'}: it is that of backbone.model, which is missing")
        return
    for key in _OF_PARTS:
        if key in variant:
            raise UserError(
                f"{where / key}: found with backbone.model, which has a language model, an encoder and a projector of "
                "its own (connector); leave one out"
            )
    if variant.get("quantization") == "gguf":
        raise UserError(
            f"{where / 'quantization'}: found 'gguf' with backbone.model, but a GGUF file has a language model alone; "
            "allowed: nf4, int8, or no quantization"
        )


_NOT_GIVEN = {"encoder_plugins", "encoder_options"}  # fields that ``encoders`` says


def _with_names(variant: Mapping[str, Any], where: Cursor) -> dict[str, Any]:
    """The section with the names of encoders under ``encoders``; what is said beside them has a field of its own."""
    encoders = variant.get("encoders")
    if not isinstance(encoders, dict):
        return dict(variant)
    names, options = {}, {}
    for modality, given in encoders.items():
        if not isinstance(given, dict):
            names[modality] = given
            continue
        if "model" not in given:
            raise UserError(f"{where / modality / 'model'}: this key is required; allowed: a folder or a hub id")
        names[modality] = given["model"]
        options[modality] = {key: value for key, value in given.items() if key != "model"}
    return {**variant, "encoders": names, "encoder_options": options}


def _backbones(section: Mapping[str, Any], where: Cursor, folder: Path) -> Iterator[Backbone]:
    # A mapping under `roles` is one value, not a section with axes of its own.
    fixed = {"roles": [section["roles"]]} if isinstance(section.get("roles"), dict) else {}
    for variant in axes({**section, **fixed}, where):
        for key in _NOT_GIVEN & variant.keys():
            allowed = did_you_mean(key, sorted(Backbone.model_fields.keys() - _NOT_GIVEN))
            raise UserError(f"{where / key}: unknown key; {allowed}")
        _check_model_keys(variant, where)
        backbone = check(Backbone, _with_names(variant, where / "encoders"), where)
        models = {"language_model" if backbone.model is None else "model": backbone.language_model}
        for key, name in (models | {f"encoders.{m}": name for m, name in backbone.encoders.items()}).items():
            try:
                check_model(name, folder)
            except ValueError as error:
                raise UserError(f"{functools.reduce(operator.truediv, key.split('.'), where)}: {error}") from None
        if backbone.revision is not None and hub.looks_like_folder(locate_model(backbone.language_model, folder)):
            raise UserError(
                f"{where / 'revision'}: found {backbone.revision!r}, but {backbone.language_model!r} is a folder; "
                "allowed: a branch, tag or commit of a hub id"
            )
        if backbone.roles is not None:
            from adapters.placement.roles import parse_roles

            try:
                parse_roles(backbone.roles)
            except UserError as error:
                raise UserError(f"{where / 'roles'}: {error}") from None
        yield backbone
