"""The API reference in docs/reference has every public name, once."""

from __future__ import annotations

import re
from pathlib import Path

import harness

PAGES = sorted((Path(__file__).parents[2] / "docs" / "reference").glob("*.md"))


def test_every_public_name_is_in_the_reference_once() -> None:
    shown = [n for page in PAGES for n in re.findall(r"^::: harness\.(\w+)$", page.read_text("utf-8"), re.MULTILINE)]
    assert sorted(shown) == sorted(harness.__all__)
