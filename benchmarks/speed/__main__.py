"""Speed and memory beside other ways to run the same: ``make bench``, or ``python -m benchmarks.speed PART …``.

A part is measured in a process of its own and written to a JSON file, from which ``table`` makes the Markdown of
docs/performance.md; ``all`` runs all parts. Arms are interleaved, and ratios are medians of ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.speed import grid, limits, memory, quickstart, real, scoring, steps, table
from benchmarks.speed.measure import ROOT, Say, machine, use_cores

PARTS = {
    "steps": steps, "limits": limits, "scoring": scoring, "memory": memory, "real": real, "quickstart": quickstart,
    "grid": grid,
}  # fmt: skip
JSON = ROOT / "build" / "speed.json"


def main() -> None:
    """Measure a part or all parts, or make the table."""
    options = _options()
    console = Console(soft_wrap=True)
    if options.part == "table":
        text = table.markdown(json.loads(options.json.read_text(encoding="utf-8")))
        if options.write:
            table.write(options.write, text)
        else:
            console.out(text, highlight=False)
        return
    if options.part == "all":
        _all(options, console)
        return
    use_cores()
    part = PARTS[options.part]
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        before = machine()
        found = part.measure(options, Path(folder), Say(console, 60 * part.MINUTES * options.rounds))
    _add(options.json, options.part, {"machine": before, "rounds": options.rounds, **found})
    for one in part.rows(found):
        console.print(f"{one.what}: {one.ours}, {one.other}: {one.ratio} ({one.target})", highlight=False, markup=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    for name, part in PARTS.items():
        one = parts.add_parser(
            name, help=f"{(part.__doc__ or '').splitlines()[0]} About {part.MINUTES:g} minutes a round."
        )
        one.add_argument("--rounds", type=int, default=1)
        one.add_argument("--json", type=Path, default=JSON, help="results are added to this file")
        part.add_options(one)
    whole = parts.add_parser("all", help="All parts, one after the other.")
    whole.add_argument("--json", type=Path, default=JSON, help="results are added to this file")
    whole.add_argument("--rounds", type=int, default=1, help="of every part")
    whole.add_argument("--without", nargs="+", choices=PARTS, default=[], help="parts to leave out")
    shown = parts.add_parser("table", help="Markdown of the results.")
    shown.add_argument("--json", type=Path, default=JSON)
    shown.add_argument("--write", type=Path, help="put it between the markers of this file")
    return parser.parse_args()


def _all(options: argparse.Namespace, console: Console) -> None:
    """Every part in a process of its own; one that fails does not stop the others."""
    names = [name for name in PARTS if name not in options.without]
    minutes = {name: PARTS[name].MINUTES * options.rounds for name in names}
    failed, began = [], time.monotonic()
    for number, name in enumerate(names, start=1):
        left = sum(minutes[later] for later in names[number - 1 :])
        console.rule(f"{name}: part {number} of {len(names)}, about {left:.0f} minutes left")
        command = [sys.executable, "-m", "benchmarks.speed", name, "--rounds", str(options.rounds)]
        if subprocess.run([*command, "--json", str(options.json)], cwd=ROOT, check=False).returncode:
            failed.append(name)
    console.rule(f"{(time.monotonic() - began) / 60:.0f} minutes")
    console.out(table.markdown(json.loads(options.json.read_text(encoding="utf-8"))), highlight=False)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _add(path: Path, part: str, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | {part: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
