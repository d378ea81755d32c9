"""``harness doctor``: whether trials can run here, line by line."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

console = Console()
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    profile: Annotated[
        str,
        typer.Option("--profile", "-p", metavar="NAME", help="Where to run: a profile's name, or its YAML file."),
    ] = "local",
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="PLACE", help="Folder or URL of the run folders.")
    ] = None,
) -> None:
    """Check whether this machine, and the cluster of a profile, can run trials. Exit code 1: something would fail."""
    from harness.doctor.doctor import diagnose

    failed = 0
    for finding in diagnose(profile, output):
        failed += finding.level == "fail"
        line = Text.assemble((f"{finding.level:4}", _STYLES[finding.level]), f"  {finding.what}: {finding.found}")
        console.print(line, soft_wrap=True)
        if finding.advice:
            console.print(f"      {finding.advice}", highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)
