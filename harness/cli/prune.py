"""``harness prune``: what a run folder needs no more."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from harness.cli.results import RunFolder, newest_run
from harness.core.errors import UserError
from harness.core.storage import url_of

console = Console()


def _print(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def prune(
    folder: RunFolder = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it; without, only list it.")] = False,
) -> None:
    """List trials that the plan names no more, and checkpoints of finished trials; with --yes, put them away.

    Trials are moved to RUN/pruned, which nothing reads; checkpoints are deleted. MLflow keeps its runs.
    """
    from harness.sweep.lock import exclusive
    from harness.sweep.prune import PRUNED, leftovers, remove
    from results.leaderboard.format import size_text
    from results.leaderboard.join import read_runs

    folder = folder or newest_run()
    if url_of(folder):
        raise UserError(f"{url_of(folder)}: prune works on a folder, not on a copy of one at a URL")
    found = leftovers(read_runs([folder]))
    for one in found:
        _print(f"{'move' if one.kept else 'delete'} {one.path} ({size_text(one.size_bytes)}): {one.why}")
    if not found:
        _print(f"{folder}: nothing to prune")
    elif not yes:
        _print(f"nothing was changed; harness prune {folder} --yes does it")
    else:
        with exclusive(folder, _print):
            for one in leftovers(read_runs([folder])):  # once more: a run may have ended meanwhile
                remove(folder, one)
        kept = sum(one.kept for one in found)
        _print(f"moved {kept} to {folder / PRUNED}, deleted {len(found) - kept}")
