"""Reads how learning rates are searched: ``search`` of an adapter entry, and of the experiment for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Discriminator, Field, PositiveInt, Tag

from harness.core.cursor import Cursor
from harness.core.errors import UserError
from harness.core.search import ADAPTIVE, Halving, Range, Rate, Sampler, Search
from harness.core.validation import check
from harness.experiment.samplers import first_candidates
from harness.experiment.sections import AdapterChoice, Budget, Optimizer, Section

# With a discriminator an error is about the kind that was given.
_Rates = Annotated[
    Annotated[Range, Tag("range")] | Annotated[tuple[Rate, ...], Field(min_length=1), Tag("values")],
    Discriminator(lambda given: "range" if isinstance(given, Mapping | Range) else "values"),
]


class EntrySearch(Section):
    """``search`` of an adapter entry; what it leaves out is taken from the experiment's ``search``."""

    learning_rate: _Rates | None = None  # a range, or values
    candidates: PositiveInt | None = None  # how many learning rates
    sampler: Sampler | None = None  # default: random for a range, grid for values
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None  # of the sampler; default 0


class SearchDefaults(EntrySearch):
    """The section ``search`` of an experiment: for entries without their own, and halving, for all of them."""

    halving: Halving | None = None


def with_rates(
    section: Mapping[str, Any], defaults: SearchDefaults, where: Cursor
) -> tuple[dict[str, Any], Search | None]:
    """An adapter entry whose search is a list under ``learning_rate``, as if it were written there; and the search.

    The entry of a sampler that learns gets no ``learning_rate``: its rates follow from results (see plan.py).

    Args:
        section: the entry.
        defaults: of the experiment.
        where: location of the entry.

    Raises:
        UserError: the search is invalid, or the entry has a learning rate beside it.
    """
    here, own = where / "search", section.get("search", {})
    if not isinstance(own, Mapping):
        raise UserError(
            f"{here}: found {own!r}; allowed: a mapping such as {{learning_rate: {{log_uniform: [1e-4, 1e-2]}}}}"
        )
    if "halving" in own:
        raise UserError(
            f"{here / 'halving'}: halving is the same for all methods; allowed in the section search of the experiment"
        )
    given = check(EntrySearch, own, here)
    fixed = "learning_rate" in section
    if fixed and given.learning_rate is not None:
        raise UserError(f"{here / 'learning_rate'}: the entry has a learning_rate too; allowed: one of the two")
    if fixed and "search" in section:
        raise UserError(f"{here}: the entry has a learning_rate; search.learning_rate takes a list of values too")
    if fixed or (given.learning_rate is None and defaults.learning_rate is None):
        if "search" in section:
            raise UserError(f"{here / 'learning_rate'}: this key is required; a range or a list of values")
        return dict(section), None
    search = _search(given, defaults, here)
    try:
        rates = first_candidates(search)
    except UserError as error:
        raise UserError(f"{here / 'learning_rate'}: {error}") from None
    found: dict[str, Any] = {}
    for key, value in section.items():  # in the place of the key, because the first axis varies slowest
        found |= {"learning_rate": list(rates)} if key == "search" else {key: value}
    found.setdefault("learning_rate", list(rates))
    if search.sampler in ADAPTIVE:
        del found["learning_rate"]
    return found, search


def _search(given: EntrySearch, defaults: SearchDefaults, here: Cursor) -> Search:
    own = {key: value for key, value in given if value is not None}
    general = {key: getattr(defaults, key) for key in EntrySearch.model_fields if getattr(defaults, key) is not None}
    merged = {**general, **own}
    rates = merged["learning_rate"]
    if isinstance(rates, Range):
        if "candidates" not in merged:
            raise UserError(f"{here / 'candidates'}: this key is required: how many learning rates of the range")
        return Search(**{"sampler": "random", **merged})
    if len(set(rates)) < len(rates):
        raise UserError(f"{here / 'learning_rate'}: a value is given twice: {list(rates)}")
    for key, only in (("sampler", "grid"), ("candidates", len(rates))):
        if key in own and own[key] != only:
            raise UserError(f"{here / key}: found {own[key]!r}; allowed with a list of {len(rates)} values: {only}")
    return Search(**{**merged, "sampler": "grid", "candidates": len(rates)})


def check_equal(found: Iterable[tuple[int, AdapterChoice]], optimizers: Sequence[Optimizer], where: Cursor) -> None:
    """Check that every row of a setting is chosen from as many learning rates as the others.

    Args:
        found: index of the entry and one of its choices, of one task.
        optimizers: whose learning rates hold for choices without their own.
        where: location of ``adapters``.

    Raises:
        UserError: two rows differ; the message names their entries.
    """
    rates: dict[str, set[float]] = {}
    entries: dict[str, tuple[int, str, int]] = {}
    for index, choice in found:
        row = choice.model_dump_json(exclude={"learning_rate", "tried_learning_rates"})
        own = rates.setdefault(row, set())
        own |= {rate for rate in (choice.learning_rate, *choice.tried_learning_rates) if rate is not None}
        several = choice.search.candidates if choice.search and choice.search.sampler in ADAPTIVE else 0
        if not several and choice.learning_rate is None:
            own |= {one.learning_rate for one in optimizers if one.learning_rate is not None}
        entries[row] = index, f"{choice.label} {choice.grouping_name}".rstrip(), len(own) + several
    first, *others = entries.values() or [(0, "", 0)]
    for index, name, count in others:
        if count != first[2]:
            raise UserError(
                f"{where / index}: {name} is chosen from {count} learning rate{'s' * (count > 1)}, but {first[1]} "
                f"({(where / first[0]).key}) from {first[2]}; a search must be equal for all methods: set candidates, "
                "or the number of values, or tried_learning_rates"
            )


def check_halving(halving: Halving, choices: Iterable[AdapterChoice], budgets: Sequence[Budget], where: Cursor) -> None:
    """Check that halving fits the budgets and the searches.

    Args:
        halving: of the experiment.
        choices: all adapters.
        budgets: all budgets.
        where: location of ``search.halving``.

    Raises:
        UserError: a rung is not before the last epoch, or a sampler that learns is used.
    """
    short = min(budgets, key=lambda budget: budget.epochs)
    if halving.rungs[-1] >= short.epochs:
        raise UserError(
            f"{where / 'rungs'}: found {halving.rungs[-1]}, but budget.epochs is {short.epochs}; allowed: epochs "
            "before the last one"
        )
    for choice in choices:
        if choice.search is not None and choice.search.sampler in ADAPTIVE:
            raise UserError(
                f"{where}: halving compares all candidates of a row at once, but sampler {choice.search.sampler} "
                f"({choice.label}) asks for one after the other; allowed with halving: grid, random, qmc"
            )
