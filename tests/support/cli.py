"""``harness …`` in this process, as its tests call it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.cli import app


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Harness = Callable[..., Outcome]


def caller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *first: str) -> Harness:
    """Calls ``harness`` with the first arguments and those of the call."""

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
    """Exit code 2 and one message; nothing was computed."""
    assert outcome.code == 2
    assert says in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err
    assert list(Path.cwd().rglob("trials")) == []
