"""The error that is the user's to mend, alone or many at once, and the nearest-name hint of every such message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 10


class UserError(Exception):
    """Wrong input. The command line prints the message without a traceback and exits with code 2.

    A message says where (file and key path), what was found, what is allowed and the nearest name.
    """


class Problems(UserError):  # noqa: N818 - what it is: several
    """Several things wrong with one input; ``messages`` has all of them, the text the first ten."""

    def __init__(self, messages: Iterable[str]) -> None:
        self.messages = tuple(messages)
        rest = len(self.messages) - _SHOWN
        more = [f"… and {rest} more"] if rest > 0 else []
        super().__init__("\n".join([f"{len(self.messages)} problems:", *self.messages[:_SHOWN], *more]))


class ProblemList:
    """Collects what is wrong while reading goes on, so that a user hears of everything at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str | UserError) -> None:
        """Take one problem, or all those of another error."""
        self.messages += message.messages if isinstance(message, Problems) else [str(message)]

    def raise_any(self) -> None:
        """Raise what was collected.

        Raises:
            UserError: there was one problem.
            Problems: there were several.
        """
        if len(self.messages) == 1:
            raise UserError(self.messages[0])
        if self.messages:
            raise Problems(self.messages)


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """Return ``allowed: a, b, c; did you mean 'b'?`` for the end of an error message."""
    names = sorted(allowed)
    hint = f"allowed: {', '.join(names) or 'nothing'}"
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    return f"{hint}; did you mean {near[0]!r}?" if near else hint
