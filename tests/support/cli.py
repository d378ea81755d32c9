"""Calls of ``harness …`` in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.cli import app


@dataclass
class Outcome:
    """The result of a command."""

    code: int
    out: str
    err: str


Harness = Callable[..., Outcome]


def caller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *first: str) -> Harness:
    """A function that calls ``harness`` with the first arguments, followed by those of the call."""

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["harness", *first, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            app.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def assert_refused(outcome: Outcome, says: str) -> None:
    """Check for exit code 2 and a single error message, and that nothing was computed."""
    assert outcome.code == 2
    assert says in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err
    assert list(Path.cwd().rglob("trials")) == []
