"""Errors caused by user input, one or several at once, and the nearest-name hint in their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 10


class UserError(Exception):
    """Invalid user input. The command line prints the message without a traceback and exits with code 2.

    A message contains the location (file and key path), what was found, what is allowed and the nearest name.
    """


class Problems(UserError):  # noqa: N818 - several errors in one
    """Several errors in one input; ``messages`` has all of them, the text the first ten."""

    def __init__(self, messages: Iterable[str]) -> None:
        self.messages = tuple(messages)
        rest = len(self.messages) - _SHOWN
        more = [f"… and {rest} more"] if rest > 0 else []
        super().__init__("\n".join([f"{len(self.messages)} problems:", *self.messages[:_SHOWN], *more]))


class SweepEndedError(Exception):
    """A sweep ended before its trials, for a reason that is no fault of the input; finished trials are kept."""


class ProblemList:
    """Collects errors while reading continues, so that all of them are reported at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str | UserError) -> None:
        """Add a message, or all messages of another error."""
        self.messages += message.messages if isinstance(message, Problems) else [str(message)]

    def raise_any(self) -> None:
        """Raise the collected errors, if any.

        Raises:
            UserError: there is one.
            Problems: there are several.
        """
        if len(self.messages) == 1:
            raise UserError(self.messages[0])
        if self.messages:
            raise Problems(self.messages)


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """``allowed: a, b, c; did you mean 'b'?``, for the end of an error message."""
    names = sorted(allowed)
    hint = f"allowed: {', '.join(names) or 'nothing'}"
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    return f"{hint}; did you mean {near[0]!r}?" if near else hint
