"""The results as Markdown, and where docs/performance.md has them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- speed: begin (python -m benchmarks.speed table --write FILE) -->", "<!-- speed: end -->"
ORDER = ("grid", "quickstart", "memory", "scoring", "steps", "real", "limits")


def markdown(results: Mapping[str, Any]) -> str:
    """The table of all parts that were measured, and their notes.

    Args:
        results: of the JSON file.
    """
    lines = ["| measured | ours | compared with | ratio | to reach | reached |", "|---|---:|---:|---:|---:|---|"]
    notes = []
    for name in ORDER:
        if name not in results:
            continue
        part = import_module(f"benchmarks.speed.{name}")
        for one in part.rows(results[name]):
            met = {True: "yes", False: "**no**", None: ""}[one.met]
            lines.append(f"| {one.what} | {one.ours} | {one.other} | {one.ratio} | {one.target} | {met} |")
        head = f"**{name}**, `python -m benchmarks.speed {name}`, {_where(results[name])}"
        notes.append(f"{head}\n\n{part.notes(results[name])}")
    return "\n".join([*lines, "", "\n\n".join(notes)])


def _where(found: Mapping[str, Any]) -> str:
    on, rounds = found["machine"], found["rounds"]
    if isinstance(rounds, list):  # the grid keeps what each found
        rounds = len(rounds)
    return (
        f"{on['date']}, {on['commit']}: {on['processor']}, {on['cores used']} of {on['cores']} cores, "
        f"{on['memory GiB']} GiB, Python {on['python']}, torch {on['torch']}; rounds: {rounds}; load of the "
        f"machine before: {on['load before']}"
    )


def write(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what is between the markers of a file.

    Raises:
        SystemExit: it has no markers.
    """
    content = path.read_text(encoding="utf-8")
    before, found, rest = content.partition(begin)
    _, ends, after = rest.partition(end)
    if not found or not ends:
        raise SystemExit(f"{path}: has no line {begin!r} followed by {end!r}")
    path.write_text(f"{before}{begin}\n{text.rstrip()}\n{end}{after}", encoding="utf-8")
