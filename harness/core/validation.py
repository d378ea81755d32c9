"""Validate user input against a pydantic model; errors contain the location and the nearest allowed key."""

from __future__ import annotations

import copy
import datetime
import difflib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from harness.core.cursor import Cursor
from harness.core.errors import UserError, did_you_mean

M = TypeVar("M", bound=BaseModel)
# Pydantic's errors where a container was expected.
_LISTS = frozenset({"list_type", "tuple_type", "set_type", "frozen_set_type"})
_MAPPINGS = frozenset({"dict_type", "mapping_type", "model_type", "model_attributes_type"})
_MOST_COUNTED = 5  # a number is shown as a list of so many at most


def check(
    model: type[M],
    data: Mapping[str, Any],
    where: Cursor,
    also: Iterable[str] = (),
    hint: str = "",
    context: Mapping[str, Any] | None = None,
) -> M:
    """Validate options; only the first error is reported.

    Args:
        model: the model of the options.
        data: the options as the user wrote them.
        where: their location.
        also: further keys of the same section, read elsewhere; listed as allowed when a key is unknown.
        hint: added to the error if a list was given for a single value.
        context: for the model's validators, such as ``harness.core.paths.relative_to``.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    try:
        return _validated(model, data, where, context)
    except ValidationError as error:
        as_text = _with_texts(error, data, where)
        if as_text is None:
            raise UserError(_message(error, model, data, where, also, hint)) from None
    return check(model, as_text, where, also, hint, context)


def _validated(model: type[M], data: Mapping[str, Any], where: Cursor, context: Mapping[str, Any] | None) -> M:
    try:
        text = json.dumps(dict(data), default=_as_text)
    except TypeError as error:
        place = str(where) or "experiment"
        raise UserError(f"{place}: options must be numbers, strings, lists and mappings; {error}") from None
    # Through JSON: its strict mode accepts a string for a path and a list for a tuple, but not "4" for 4.
    return model.model_validate_json(text, strict=True, context=dict(context or {}))


def _with_texts(error: ValidationError, data: Mapping[str, Any], where: Cursor) -> dict[str, Any] | None:
    """The options with the text of environment values that look like numbers where text is needed; None: no such."""
    if not where.texts:
        return None
    replaced, found = copy.deepcopy(dict(data)), False
    for problem in error.errors():
        if problem["type"] not in ("string_type", "path_type"):
            continue
        location = [part for part in problem["loc"] if isinstance(part, int) or _is_key(data, part)]
        text = where.texts.get((*where.path, *location))
        if text is not None:
            holder: Any = replaced
            for part in location[:-1]:
                holder = holder[part]
            holder[location[-1]], found = text, True
    return replaced if found else None


def _as_text(value: Any) -> str:
    if isinstance(value, PurePath | datetime.date):  # YAML reads 2020-01-01 as a date
        return str(value)
    raise TypeError(f"found {value!r}, which is a {type(value).__name__}")


def _message(
    error: ValidationError, model: type[BaseModel], data: Any, where: Cursor, also: Iterable[str], hint: str
) -> str:
    first = error.errors()[0]
    # Pydantic's location also contains the members of a union ("int", "literal['all']"): keep only keys of the input.
    location = [part for part in first["loc"] if isinstance(part, int) or _is_key(data, part)]
    missing = first["type"] == "missing"
    place = where
    for part in (*location, *(first["loc"][-1:] if missing else ())):
        place /= part
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        inner = _inner(model, first["loc"][:-1])
        allowed = (*model.model_fields, *also) if inner is model else tuple(inner.model_fields)
        return f"{place}: unknown key {key!r}; {did_you_mean(key, allowed)}"
    if missing:
        return f"{place}: this key is required"
    same = [e for e in error.errors() if e["loc"][:1] == first["loc"][:1]]
    text = " or ".join(dict.fromkeys(_expected(e) for e in same)).replace("value error, ", "")
    examples = _containers(model, data, location, first["input"], {e["type"] for e in same})
    such_as = f", such as {' or '.join(map(_as_yaml, examples))}" if examples else ""
    found = f"{place}: {text}{such_as}; found {_found(first['input'])}{_nearest(first)}"
    return f"{found}; {hint}" if hint and isinstance(first["input"], list) else found


def _expected(problem: Any) -> str:
    """What was expected, in the words of YAML rather than JSON."""
    if problem["type"] in _LISTS:
        return "input should be a list"
    if problem["type"] in _MAPPINGS:
        return "input should be a mapping (key: value)"
    message: str = problem["msg"]
    return message[:1].lower() + message[1:]


def _found(value: Any) -> str:
    return "null" if value is None else repr(value)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False).strip()


def _containers(
    model: type[BaseModel], data: Any, location: Sequence[int | str], found: Any, problems: Set[str]
) -> list[Any]:
    """Lists or mappings that contain what was found instead of them, and are right there."""
    if not location or problems.isdisjoint(_LISTS | _MAPPINGS):
        return []
    candidates: list[Any] = []
    if not problems.isdisjoint(_LISTS):
        candidates.append([found])
        if type(found) is int and 0 < found <= _MOST_COUNTED:  # perhaps meant as a number of them
            candidates.append([*range(found)])
    inner = _inner(model, location)
    if not problems.isdisjoint(_MAPPINGS) and inner is not model:
        # A key that has a value of its own is more likely to be meant than one that may be left out.
        names = sorted(inner.model_fields, key=lambda name: inner.model_fields[name].default is None)
        with_keys = ({name: found} for name in names)
        candidates += itertools.islice((one for one in with_keys if _is_right(model, data, location, one)), 1)
    right = [one for one in candidates if _is_right(model, data, location, one)]
    if inner is model and (not right or (type(found) is int and len(right) == 1)):
        known = _examples(model.model_fields.get(str(location[0])), found)
        right += [one for one in known if _is_right(model, data, location, one)][:1]
    return [one for number, one in enumerate(right) if one not in right[:number]]


def _examples(field: Any, found: Any) -> Iterator[Any]:
    """The examples of a field; mappings with what was found in them where it is of the same type, and in a list too."""
    for example in getattr(field, "examples", None) or ():
        if isinstance(example, dict):
            ((key, value),) = example.items()
            own = {key: found if type(found) is type(value) else value}
            yield from (own, [own])
        else:
            yield example


def _is_right(model: type[BaseModel], data: Any, location: Sequence[int | str], value: Any) -> bool:
    """Whether a value would be valid at a location, as it is written, whatever is wrong elsewhere."""
    replaced = copy.deepcopy(dict(data))
    holder: Any = replaced
    try:
        for part in location[:-1]:
            holder = holder[part]
        holder[location[-1]] = value
        model.model_validate_json(json.dumps(replaced, default=_as_text), strict=True)
    except ValidationError as error:
        return all(e["loc"][: len(location)] != tuple(location) for e in error.errors())
    except (LookupError, TypeError, UserError):  # what validators need is not there
        return False
    return True


def _nearest(problem: Any) -> str:
    """Which of the allowed words is near the one that was found."""
    if problem["type"] != "literal_error" or not isinstance(problem["input"], str):
        return ""
    near = difflib.get_close_matches(
        problem["input"], re.findall(r"'([^']*)'", problem["ctx"]["expected"]), n=1, cutoff=0.5
    )
    return f"; did you mean {near[0]!r}?" if near else ""


def _inner(model: type[BaseModel], location: Iterable[int | str]) -> type[BaseModel]:
    """The model of the section at a location in another model's data."""
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            candidates = (field.annotation, *get_args(field.annotation))
            model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return model


def _is_key(data: Any, key: str) -> bool:
    if isinstance(data, list):
        return any(_is_key(child, key) for child in data)
    return isinstance(data, Mapping) and (key in data or any(_is_key(child, key) for child in data.values()))
