"""Amounts as people write them, and every wrong one."""

from __future__ import annotations

import re

import pytest

from harness.core.errors import UserError
from results.leaderboard.amounts import Kind, parse_amount, parse_margin


@pytest.mark.parametrize(
    ("text", "kind", "value", "relative"),
    [
        ("500000", "count", 500_000, False),
        (500_000, "count", 500_000, False),
        ("1.5k", "count", 1_500, False),
        ("2M", "count", 2_000_000, False),
        ("0.3B", "count", 300_000_000, False),
        ("1%", "count", 0.01, True),
        ("24GiB", "size", 24 * 2**30, False),
        ("800 MB", "size", 800_000_000, False),
        ("40 %", "size", 0.4, True),
        ("2", "number", 2, False),
        (0.5, "number", 0.5, False),
    ],
)
def test_amounts(text: str | float, kind: Kind, value: float, relative: bool) -> None:
    found = parse_amount(text, kind, "--max")
    assert found.value == pytest.approx(value)
    assert found.relative is relative


@pytest.mark.parametrize(
    ("text", "kind", "allowed"),
    [
        ("two", "count", "a number such as 500000, 500k or 2M"),
        ("2 MiB", "count", "a number such as 500000, 500k or 2M"),
        ("0", "count", "above 0"),
        ("-1%", "count", "above 0"),
        ("nan", "number", "above 0"),
        ("inf", "number", "above 0"),
        ("24 gigs", "size", "a size such as 24GiB or 800MB"),
        ("", "size", "a size such as 24GiB or 800MB"),
        ("%", "number", "a number, or a share such as 1%"),
    ],
)
def test_wrong_amounts_name_the_option_and_what_is_allowed(text: str, kind: Kind, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"^--max-x: found {re.escape(repr(text))}; allowed: .*{re.escape(allowed)}"):
        parse_amount(text, kind, "--max-x")


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.02", 0.02), (0.02, 0.02), ("0", 0.0)])
def test_margins(text: str | float, value: float) -> None:
    assert parse_margin(text, "--within") == pytest.approx(value)


@pytest.mark.parametrize("text", ["-1%", "near", "inf"])
def test_wrong_margins(text: str) -> None:
    with pytest.raises(UserError, match=r"^--within: found .*; allowed: a share such as 2% or 0.02, at least 0"):
        parse_margin(text, "--within")
