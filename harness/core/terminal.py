"""What is printed may come from data, logs and records of others; a terminal obeys what it is sent."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console
from rich.segment import Segment

# Control characters, except line ends and tabs, and those that turn the direction of a text.
_CONTROL = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Terminal(Console):
    """A console that shows control characters of texts, as ``\\x1b``, instead of sending them."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(
            each if each.control else Segment(visible(each.text), each.style) for each in buffer
        )


def visible(text: str) -> str:
    """The text with its control characters written out."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text) if _CONTROL.search(text) else text
