"""The one error that is the user's to mend, and the nearest-name hint every such message ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input. The command line prints the message without a traceback and exits with code 2.

    A message says where (file and key path), what was found, what is allowed and the nearest name.
    """


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """Return ``allowed: a, b, c; did you mean 'b'?`` for the end of an error message."""
    names = sorted(allowed)
    hint = f"allowed: {', '.join(names) or 'nothing'}"
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    return f"{hint}; did you mean {near[0]!r}?" if near else hint
