"""Output of ``harness tasks`` and ``harness adapters``: plugins, their options, and the parameters of adapter methods.

Long texts are printed as lines, because a table would break them into narrow columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from adapters.registry import ADAPTERS, choose
from harness.core.cursor import Cursor
from harness.core.errors import UserError, did_you_mean
from harness.core.registry import Entry, Registry
from harness.core.source import read_value
from harness.experiment.sections import Backbone
from results.leaderboard.format import ABSENT


@dataclass(frozen=True)
class Option:
    """One option of a plugin, as it is printed."""

    name: str
    allowed: str  # "integer > 0 or null"
    default: str  # "required" if it has none


def options_of(config: type[BaseModel], check_defaults: bool = True) -> list[Option]:
    """The options of a plugin's ``Config`` class, read from its JSON schema.

    Args:
        config: the class.
        check_defaults: also validate the defaults; not for tasks, which may require one of several options.

    Raises:
        UserError: the defaults are invalid, for example because a library is not installed.
    """
    schema = config.model_json_schema()
    options = []
    for name, field in config.model_fields.items():
        value = "required"
        if not field.is_required():
            value = to_jsonable_python(field.get_default(call_default_factory=True))
        allowed = _allowed(schema["properties"][name], schema.get("$defs", {}))
        plain = isinstance(value, str) and value.isprintable()
        options.append(Option(name, allowed, value if plain else json.dumps(value)))
    if check_defaults and not any(field.is_required() for field in config.model_fields.values()):
        try:
            config.model_validate_json(config().model_dump_json())  # pydantic does not validate defaults by itself
        except ValidationError as error:
            raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    return options


_LIMITS = {"exclusiveMinimum": "> ", "minimum": "≥ ", "exclusiveMaximum": "< ", "maximum": "≤ "}
_TYPES = {"integer": "integer", "number": "number", "string": "text", "null": "null", "boolean": "true or false"}


def _allowed(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A readable form of a JSON schema, such as ``integer > 0 or null``."""
    if "$ref" in schema:
        return _allowed(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    for either in ("anyOf", "oneOf"):
        if either in schema:
            return " or ".join(_allowed(part, definitions) for part in schema[either])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(value if isinstance(value, str) else json.dumps(value) for value in values)
    if schema.get("type") == "array":
        return f"a list of {_allowed(schema.get('items', {}), definitions)}"
    if schema.get("type") == "object":
        return "a mapping"
    limits = [f"{sign}{schema[key]:,}" for key, sign in _LIMITS.items() if key in schema]
    return " ".join([_TYPES.get(schema.get("type", ""), "anything"), ", ".join(limits)]).rstrip()


def list_plugins(registry: Registry[Any], console: Console, attributes: Sequence[str] = ()) -> None:
    """Print a paragraph per plugin, and a line for a plugin that fails, which does not affect the others."""
    for entry in registry.entries().values():
        try:
            plugin = registry.load(entry.target)
            lines = [f"{name}: {', '.join(values)}" for name in attributes if (values := getattr(plugin, name))]
            options = options_of(plugin.Config, check_defaults=registry is ADAPTERS)
            summary = _summary(plugin)
        except Exception as error:  # third-party code
            _print_broken(entry.name, _reason(entry, error), console)
            continue
        _print_head(entry.name, summary, console)
        for line in lines:
            _print(line, console)
        for option in options:
            default = option.default if option.default == "required" else f"default {option.default}"
            _print(f"{option.name}: {option.allowed} ({default})", console)
        _print(f"from: {entry.origin}, {entry.target}", console, style="dim")


def _summary(plugin: Any) -> str:
    return str(getattr(plugin, "summary", (plugin.__doc__ or "").strip().partition("\n")[0]))


def _print_head(name: str, summary: str, console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(name, style="bold"), Text(summary))  # a str would be markup
    console.print(grid)


def _reason(entry: Entry, error: Exception) -> str:
    """The first line of the error message."""
    text = str(error) if isinstance(error, UserError) else f"{entry.target}: {type(error).__name__}: {error}"
    first, newline, _ = text.partition("\n")
    return f"{first} … (harness adapters METHOD shows the rest)" if newline else first


def _print_broken(names: str, reason: str, console: Console) -> None:
    console.print(Text.assemble((names, "bold"), "  ", ("cannot be used: ", "red"), reason), soft_wrap=True)


def _print(text: str, console: Console, style: str = "") -> None:
    console.print(Padding(Text(text, style=style), (0, 0, 0, 4), expand=False))


@dataclass(frozen=True)
class CountFor:
    """What parameters are counted for: a language model, contexts, and options that differ from their defaults."""

    model: str
    contexts: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def headings(self) -> tuple[str, str]:
        """Column headings: one group for all contexts, and one group per context."""
        return "agnostic", f"specific ({', '.join(self.contexts)})"


@dataclass(frozen=True)
class _Counts:
    """Trainable parameters that a method adds to a language model, by the role of the layers."""

    label: str
    agnostic: Mapping[str, int]
    specific: Mapping[str, int] | None  # None: the method has no groups

    def row(self, role: str | None = None) -> tuple[str, str]:
        """The two counts as text, for the layers of one role or for all layers."""

        def cell(counts: Mapping[str, int] | None) -> str:
            return ABSENT if counts is None else f"{sum(counts.values()) if role is None else counts[role]:,}"

        return cell(self.agnostic), cell(self.specific)


def parse_options(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse ``rank=64`` into ``{"rank": 64}``; values are read as in an experiment file.

    Raises:
        UserError: an assignment has another form.
    """
    options = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"--set {assignment}: found no '='; expected OPTION=VALUE, such as rank=64")
        try:
            options[name] = read_value(value)
        except UserError:
            raise UserError(f"--set {assignment}: {value!r} is not valid YAML") from None
    return options


def parse_contexts(names: str) -> tuple[str, ...]:
    """Split ``image,text`` into names.

    Raises:
        UserError: a name is invalid or listed twice.
    """
    contexts = tuple(name.strip() for name in names.split(","))
    if not all(name.isidentifier() for name in contexts) or len(set(contexts)) < len(contexts):
        raise UserError(f"--contexts {names}: allowed: different names (letters, digits, _), such as image,audio,text")
    return contexts


def show_adapter(name: str, console: Console, count_for: CountFor | None = None) -> None:
    """Print one method, or a combination (``lora+bitfit``), in detail.

    Raises:
        UserError: the method or an option is unknown, or the method does not fit the language model.
    """
    entries = ADAPTERS.find_all(name)
    method_class = ADAPTERS.load(*(entry.target for entry in entries))
    options = options_of(method_class.Config)
    counts = _count(name, _language_model(count_for.model), count_for) if count_for else None
    _print_head(name, _summary(method_class), console)
    grid = Table.grid(padding=(0, 2))
    for option in options:
        grid.add_row(*map(Text, (option.name, option.default, option.allowed)))
    console.print(Padding(grid, (0, 0, 0, 4), expand=False))
    groups = "one set of parameters per context group" if method_class.grouped else "none; grouping is not supported"
    start = "equal to the base model" if method_class.identity_at_start else "different from the base model"
    origins = [f"from: {entry.origin}, {entry.target}" for entry in entries]
    for line in (f"groups: {groups}", f"at start: {start}", *origins):
        _print(line, console)
    if count_for and counts:
        console.print(Text(f"\n{counts.label}: trainable parameters in {count_for.model}", style="bold"))
        rows = [("", *count_for.headings), *((role, *counts.row(role)) for role in counts.agnostic)]
        _print_columns([*rows, ("all", *counts.row())], console)


def count_adapters(console: Console, count_for: CountFor) -> None:
    """Print a line per method: the parameters that it adds to the language model, or why it cannot be used.

    Raises:
        UserError: the language model could not be loaded, or no method has one of the options.
    """
    language_model = _language_model(count_for.model)
    rows, known = [("", "", *count_for.headings)], set[str]()
    broken: dict[str, list[str]] = {}  # reason → methods; an unsupported architecture is the same reason for many
    for entry in ADAPTERS.entries().values():
        try:
            fields = set(ADAPTERS.load(entry.target).Config.model_fields)
            known |= fields
            options = {name: value for name, value in count_for.options.items() if name in fields}
            counts = _count(entry.name, language_model, CountFor(count_for.model, count_for.contexts, options))
            rows.append((entry.name, counts.label, *counts.row()))
        except Exception as error:  # third-party code
            broken.setdefault(_reason(entry, error), []).append(entry.name)
    for name in count_for.options:
        if name not in known:
            raise UserError(f"--set {name}: no adapter has this option; {did_you_mean(name, known)}")
    total = sum(parameter.numel() for parameter in language_model.parameters())
    console.print(Text(f"trainable parameters in {count_for.model}, which has {total:,} parameters", style="bold"))
    _print_columns(rows, console)
    for reason, names in broken.items():
        _print_broken(", ".join(names), reason, console)


def _print_columns(rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print rows as columns; the last two columns are numbers, which are aligned to the right."""
    grid = Table.grid(padding=(0, 2))
    for index in range(len(rows[0])):
        is_number = index >= len(rows[0]) - 2
        grid.add_column(justify="right" if is_number else "left", no_wrap=is_number)
    for row in rows:
        grid.add_row(*map(Text, row))
    console.print(grid)


def _language_model(name: str) -> Any:
    """The language model on the ``meta`` device: shapes without weights."""
    from harness.model.backbones import build_empty

    return build_empty(Backbone(language_model=name))


def _count(name: str, language_model: Any, count_for: CountFor) -> _Counts:
    method = choose({"method": name, **count_for.options}, Cursor(path=("--set",))).method
    agnostic = _added(method, language_model, "agnostic", count_for.contexts)
    specific = _added(method, language_model, "specific", count_for.contexts) if method.grouped else None
    return _Counts(method.label(), agnostic, specific)


def _added(method: Any, language_model: Any, grouping: str, contexts: tuple[str, ...]) -> dict[str, int]:
    import torch

    from adapters.attach import Adapters
    from adapters.placement.router import Router
    from harness.core.contexts import resolve_grouping

    router = Router(resolve_grouping(grouping, contexts)[0])
    methods = dict.fromkeys(router.groups, method)
    with torch.device("meta"):
        adapters = Adapters(language_model, methods, router, 0, None if method.grouped else method)
    by_role = adapters.parameters_by_role()
    trained = {id(parameter): parameter.numel() for parameter in method.trained(language_model)}
    return {**by_role, **({"the model's own": sum(trained.values())} if trained else {})}
