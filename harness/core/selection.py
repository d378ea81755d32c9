"""Selects trials of a plan by what they are: ``rank=8 and seed<3``.

The names are those of the columns of ``trials.parquet`` that are known before a trial runs; of an option the part after
its last dot is enough where no other name ends so. The text is parsed by a grammar, and nothing of it is executed.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyparsing as pp

from harness.core.errors import UserError, did_you_mean
from harness.core.record import Plan, PlannedTrial

NAMED = ("trial_id", "setting", "label", "method", "grouping", "learning_rate", "seed")  # fields of a planned trial
_OF_GROUPS = "adapter.groups."
_LONGEST = 2000  # characters; nested parentheses are parsed by recursion
_SHOWN = 100  # characters of the text in a message
_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


class Number(float):
    """A number as it was written: ``trial_id=123456789012`` means the text."""

    text = ""

    @classmethod
    def read(cls, text: str) -> Number:
        """The number of a text."""
        number = cls(text)
        number.text = text
        return number


Value = str | Number | bool


@dataclass(frozen=True)
class Comparison:
    """``rank = 8``, or ``seed in [0, 1]``."""

    name: str
    operator: str  # "=", "!=", "<", "<=", ">", ">=", "in"
    values: tuple[Value, ...]

    def holds(self, found: Any) -> bool:
        """Whether it is true of a value; of a trial without the option, ``!=`` alone is."""
        if self.operator == "!=":
            return not _equal(found, self.values[0])
        if self.operator in _ORDER:
            number = isinstance(found, int | float) and not isinstance(found, bool)
            return number and _ORDER[self.operator](found, float(self.values[0]))
        return any(_equal(found, value) for value in self.values)


@dataclass(frozen=True)
class Combination:
    """``and`` or ``or`` of several tests, or ``not`` of one."""

    word: str
    tests: tuple[Comparison | Combination, ...]


Test = Comparison | Combination


def select(plan: Plan, text: str, where: str = "--only") -> frozenset[str]:
    """The ids of the trials that a text selects.

    Args:
        plan: with all trials.
        text: such as ``rank=8 and seed<3``.
        where: for messages.

    Raises:
        UserError: the text cannot be read, names no column, or selects no trial.
    """
    test = parse(text, where)
    values = {trial.trial_id: _values(plan, trial) for trial in plan.trials}
    known = dict.fromkeys(name for own in values.values() for name in own)
    full = {one.name: _full_name(one.name, known, where) for one in _comparisons(test)}
    selected = frozenset(trial_id for trial_id, own in values.items() if _holds(test, own, full))
    if not selected:
        raise UserError(f"{where}: {_shown(text)} selects none of {len(values)} trials{_hint(test, values, full)}")
    return selected


def parse(text: str, where: str = "--only") -> Test:
    """What a text tests.

    Raises:
        UserError: it cannot be read.
    """
    if len(text) > _LONGEST:
        raise UserError(f"{where}: found {len(text):,} characters; allowed: {_LONGEST:,}")
    try:
        test: Test = _grammar().parse_string(text, parse_all=True)[0]
    except (pp.ParseBaseException, RecursionError) as error:
        at = f" at character {error.column}" if isinstance(error, pp.ParseBaseException) else ""
        raise UserError(
            f"{where}: {_shown(text)} cannot be read{at}; allowed: NAME=VALUE with =, !=, <, <=, > or >=, "
            "NAME in [VALUE, VALUE], joined by and, or, not and parentheses, such as 'rank=8 and seed<3'"
        ) from None
    for one in _comparisons(test):
        if one.operator in _ORDER and not isinstance(one.values[0], Number):
            raise UserError(f"{where}: {one.name}{one.operator}{one.values[0]}: found a word; allowed: a number")
    return test


@cache
def _grammar() -> pp.ParserElement:
    words = pp.MatchFirst([pp.CaselessKeyword(word) for word in ("and", "or", "not", "in")])
    number = pp.Regex(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?(?![\w./:@-])").set_parse_action(
        lambda t: Number.read(t[0])
    )
    quoted = pp.QuotedString("'") | pp.QuotedString('"')
    value = number | quoted | (~words + pp.Regex(r"[\w./:@+-]+")).set_parse_action(lambda t: _TRUTH.get(t[0], t[0]))
    name = ~words + pp.Regex(r"[A-Za-z_][\w.-]*")
    compared = (name + pp.one_of("== = != <= >= < >") + value).set_parse_action(
        lambda t: Comparison(t[0], {"==": "="}.get(t[1], t[1]), (t[2],))
    )
    listed = pp.Suppress("[") + pp.DelimitedList(value) + pp.Suppress("]")
    member = (name + pp.Suppress(pp.CaselessKeyword("in")) + listed).set_parse_action(
        lambda t: Comparison(t[0], "in", tuple(t[1:]))
    )
    # Not pyparsing's `infix_notation`, which takes exponential time for nested parentheses.
    test = pp.Forward()
    single = member | compared | (pp.Suppress("(") + test + pp.Suppress(")"))
    denied = (pp.CaselessKeyword("not") + single).set_parse_action(lambda t: Combination("not", (t[1],)))
    every = pp.DelimitedList(denied | single, pp.CaselessKeyword("and")).set_parse_action(
        lambda t: Combination("and", tuple(t))
    )
    test <<= pp.DelimitedList(every, pp.CaselessKeyword("or")).set_parse_action(lambda t: Combination("or", tuple(t)))
    return test


_TRUTH = {"true": True, "false": False}


def _comparisons(test: Test) -> Iterator[Comparison]:
    if isinstance(test, Comparison):
        yield test
    else:
        for one in test.tests:
            yield from _comparisons(one)


def _values(plan: Plan, trial: PlannedTrial) -> dict[str, Any]:
    return {name: getattr(trial, name) for name in NAMED} | plan.options | trial.options


def _full_name(name: str, known: Collection[str], where: str) -> str:
    """The column that a name means.

    Raises:
        UserError: none, or several.
    """
    if name in known:
        return name
    found = [column for column in known if column.endswith(f".{name}")]
    # What all groups have in common comes before what one of them has: rank before groups.image.rank.
    found = [column for column in found if not column.startswith(_OF_GROUPS)] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{where}: {name!r} is the end of several names; allowed: {', '.join(sorted(found))}")
    ends = Counter(column.rpartition(".")[2] for column in known)
    names = {end if ends[end := column.rpartition(".")[2]] == 1 else column for column in known}
    raise UserError(f"{where}: unknown name {name!r}; {did_you_mean(name.rpartition('.')[2], names)}")


def _holds(test: Test, values: Mapping[str, Any], full: Mapping[str, str]) -> bool:
    if isinstance(test, Comparison):
        return test.holds(values.get(full[test.name]))
    results = (_holds(one, values, full) for one in test.tests)
    return {"and": all, "or": any, "not": _none}[test.word](results)


def _none(results: Iterable[bool]) -> bool:
    return not any(results)


def _equal(found: Any, wanted: Value) -> bool:
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, Number):
        return found == wanted
    text = wanted.text if isinstance(wanted, Number) else wanted
    return (found if isinstance(found, str) else json.dumps(found, sort_keys=True)) == text


def _hint(test: Test, values: Mapping[str, Mapping[str, Any]], full: Mapping[str, str]) -> str:
    """What there is, for the first comparison that is true of no trial."""
    for one in _comparisons(test):
        found = [own.get(full[one.name]) for own in values.values()]
        if not any(one.holds(value) for value in found):
            return f"; {full[one.name]}: {_near(one.values, [value for value in found if value is not None])}"
    return ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 2]} …")


def _near(wanted: Sequence[Value], found: Sequence[Any]) -> str:
    texts = dict.fromkeys(value if isinstance(value, str) else json.dumps(value, sort_keys=True) for value in found)
    return did_you_mean(str(getattr(wanted[0], "text", wanted[0])), texts)
