"""What keeps a run folder to itself: names that lead nowhere else, and folders that are no links.

A run folder may be somebody else's, or on a storage that others write to.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from harness.core.errors import UserError
from harness.core.samples import PREVIEWS

# The name of a trial's folder.
TrialId = Annotated[str, Field(pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$")]
_FOLDERS = ("trials", "report", PREVIEWS, "launch", "ray")


def links_in(run: Path) -> list[str]:
    """Folders of a run that are links: what is read or written through them would be elsewhere."""
    found = [name for name in _FOLDERS if (run / name).is_symlink()]
    if "trials" not in found and (run / "trials").is_dir():
        with os.scandir(run / "trials") as entries:
            found += [f"trials/{entry.name}" for entry in entries if entry.is_symlink()]
    return found


def check_no_links(run: Path) -> None:
    """Check that what is written into a run folder stays in it.

    Raises:
        UserError: one of its folders is a link.
    """
    if found := sorted(links_in(run)):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{run / found[0]}: a link{more}, so files would be written elsewhere; remove it")
