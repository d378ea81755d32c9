"""The registry of adapter methods, and the one way to a method by name and options.

Importing this imports no torch: methods are imported when one is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.core.cursor import Cursor
from harness.core.errors import UserError, did_you_mean
from harness.core.registry import Plugin, Registry
from harness.core.validation import check

if TYPE_CHECKING:
    from adapters.base import AdapterMethod


def _contract() -> type[AdapterMethod]:
    from adapters.base import AdapterMethod

    return AdapterMethod


def _combine(classes: tuple[type[AdapterMethod], ...]) -> type[AdapterMethod]:
    from adapters.methods.combination import combine

    return combine(classes)


ADAPTERS: Registry[AdapterMethod] = Registry("adapter", "harness.adapters", _contract, _combine)


@dataclass(frozen=True)
class Choice:
    """A method with its options, and the plugins that it comes from."""

    name: str  # registry name, such as "lora" or "lora+bitfit"
    plugins: tuple[Plugin, ...]
    method: AdapterMethod


def check_stacked(choice: Choice) -> None:
    """Check that two groups of a method can act on one token together, as in the grouping ``shared+specific``.

    Raises:
        UserError: they cannot.
    """
    for plugin, part in zip(choice.plugins, choice.method.parts, strict=True):
        if part.grouped and part.not_stacked:
            raise UserError(
                f"{plugin.name} cannot have a shared group beside each token's own: {part.not_stacked}; allowed: "
                "agnostic, specific, or a mapping context → group"
            )


def check_of_groups(choices: Mapping[str, Choice], where: Cursor) -> None:
    """Check that what each of several groups has (group → choice) acts on the group's own tokens alone.

    Raises:
        UserError: a method acts on all tokens, and other groups do not have it alike.
    """

    def ungrouped(choice: Choice) -> list[tuple[str, Any]]:
        pairs = zip(choice.plugins, choice.method.parts, strict=True)
        return [(plugin.name, part.config) for plugin, part in pairs if not part.grouped]

    for group, choice in choices.items():
        if not choice.method.grouped:
            raise UserError(
                f"{where / group / 'method'}: {choice.name} has no adapter groups, so it is a method alone; null means "
                "no adapter"
            )
        for name, config in ungrouped(choice):
            lacking = next((g for g, other in choices.items() if (name, config) not in ungrouped(other)), None)
            if lacking is not None:
                raise UserError(
                    f"{where / group / 'method'}: {name} has no adapter groups and acts on all tokens, but {lacking} "
                    "does not have it with the same options; allowed: in every group alike, or in none"
                )


def choose(
    options: Mapping[str, Any],
    where: Cursor,
    also: Iterable[str] = (),
    context: Mapping[str, Any] | None = None,
) -> Choice:
    """The method that ``{"method": name, **options}`` asks for, with its options checked.

    Args:
        options: as the user wrote them.
        where: the location of the options, for messages.
        also: other allowed keys, which the caller has removed; an error about an unknown key lists them.
        context: for the validators of the options, such as ``harness.core.paths.relative_to``.

    Raises:
        UserError: an unknown method, an unknown option, or an option out of range.
    """
    own = dict(options)
    name = own.pop("method", None)
    if name is None:
        raise UserError(f"{where}: 'method' is required; {did_you_mean('', ADAPTERS.entries())}")
    if not isinstance(name, str):
        raise UserError(f"{where / 'method'}: found {name!r}; {did_you_mean(str(name), ADAPTERS.entries())}")
    plugins = ADAPTERS.plugins(name, str(where / "method"))
    method_class = ADAPTERS.load(*(plugin.target for plugin in plugins))
    config = check(method_class.Config, own, where, ("method", *also), context=context)
    return Choice(name, plugins, method_class(config))
