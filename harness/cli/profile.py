"""``harness profile``: speed, memory and energy of a run's methods, measured apart from training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from harness.cli.results import RunFolder, newest_run
from harness.core.terminal import Terminal

if TYPE_CHECKING:
    from harness.core.profile import Profile

console = Terminal()


def profile(
    folder: RunFolder = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure everything again; the old profile is kept until all is measured.")
    ] = False,
) -> None:
    """Measure speed and memory of a run's methods, each alone and in turn with the reference, and update the report.

    Run it again to continue where it stopped.
    """
    from harness.sweep.profile import profile_run

    folder = folder or newest_run()
    try:
        found = profile_run(folder, fresh=fresh, console=console)
    except KeyboardInterrupt:
        console.print("interrupted: run the same command again to continue; profile.json is as it was")
        raise typer.Exit(1) from None
    show(found)
    console.print(str(folder / "profile.json"), highlight=False, markup=False, soft_wrap=True)


def show(found: Profile) -> None:
    """Print a table for each setting; what was not measured is said below it."""
    from results.leaderboard.profiled import Figures

    for setting in dict.fromkeys(entry.setting for entry in found.entries):
        entries = [entry for entry in found.entries if entry.setting == setting]
        measured = [entry for entry in entries if entry.step_time_ratio is not None]
        table = Table(box=None, pad_edge=False, header_style="dim", title=setting or None, title_justify="left")
        energy = any(entry.energy_ratio is not None for entry in entries)
        for heading in ("method", "step time", "examples/s", "memory", *(["energy"] if energy else [])):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for figures in map(Figures, measured):
            cells = [figures.entry.name, figures.step_time, figures.speed, figures.memory]
            table.add_row(*cells, *([figures.energy] if energy else []))
        console.print(table)
        for entry in entries:
            if entry.reason:
                text = f"not measured: {entry.name}: {entry.reason}"
                console.print(text, highlight=False, markup=False, soft_wrap=True)
