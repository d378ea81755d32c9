"""Git revisions of this checkout and of installed distributions."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from importlib.metadata import Distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit


@cache
def git_revision(folder: Path) -> str | None:
    """The revision of the checkout that contains a folder, with ``+`` if files were changed; None outside of one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def distribution_revision(distribution: Distribution) -> str | None:
    """The git revision that a distribution was installed from, if the installer recorded it (PEP 610).

    https://packaging.python.org/en/latest/specifications/direct-url/
    """
    text = distribution.read_text("direct_url.json")
    origin = json.loads(text) if text else {}
    if "vcs_info" in origin:
        return str(origin["vcs_info"]["commit_id"])[:12]
    if origin.get("dir_info", {}).get("editable"):
        return git_revision(Path(unquote(urlsplit(origin["url"]).path)))
    return None
