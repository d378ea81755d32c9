"""Amounts as people write them: ``1%``, ``2M``, ``24GiB``, ``1.5``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

from harness.core.errors import UserError

Kind = Literal["count", "size", "number"]
_COUNT = re.compile(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kMB]?)")
_THOUSANDS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
_ALLOWED = {
    "count": "a number such as 500000, 500k or 2M",
    "size": "a size such as 24GiB or 800MB",
    "number": "a number",
}
_BYTES = TypeAdapter(ByteSize)


@dataclass(frozen=True)
class Amount:
    """An absolute amount, or a share of another one."""

    value: float
    relative: bool
    text: str  # as it was written


def parse_amount(text: str | float, kind: Kind, where: str) -> Amount:
    """An amount above 0.

    Args:
        text: ``2M``, ``24GiB``, ``2``; with a percent sign a share. A number is taken as it is.
        kind: ``count``, ``size`` (in bytes) or ``number``.
        where: the option, for the message.

    Raises:
        UserError: it is not an amount of this kind.
    """
    written = str(text).strip()
    share = written.endswith("%")
    try:
        value = _read(written[:-1].strip() if share else written, "number" if share else kind)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{where}: found {text!r}; allowed: {_ALLOWED[kind]}, or a share such as 1%, above 0")
    return Amount(value / 100 if share else value, share, written)


def parse_margin(text: str | float, where: str) -> float:
    """A margin of 0 or more: ``2%`` or ``0.02``.

    Raises:
        UserError: it is neither.
    """
    written = str(text).strip()
    try:
        value = float(written.removesuffix("%")) / (100 if written.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{where}: found {text!r}; allowed: a share such as 2% or 0.02, at least 0")
    return value


def _read(text: str, kind: Kind) -> float:
    if kind == "size":
        try:
            return float(_BYTES.validate_python(text))
        except ValidationError as error:
            raise ValueError(text) from error
    if kind == "count":
        match = _COUNT.fullmatch(text)
        if match is None:
            raise ValueError(text)
        return float(match[1]) * _THOUSANDS[match[2]]
    return float(text)
