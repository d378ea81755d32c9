"""Git revisions of this checkout and of installed distributions."""

from __future__ import annotations

import hashlib
import json
import subprocess
from functools import cache
from importlib.metadata import Distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit


@cache
def git_revision(folder: Path) -> str | None:
    """The revision of the checkout that contains a folder; None outside of one.

    If files were changed, ``+`` and a digest of the changes follow: two states of one revision are not the same code.
    """
    try:
        revision = _git(folder, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+").decode().strip()
        if not revision.endswith("+"):
            return revision
        changes = _git(folder, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--binary")
        return revision + hashlib.sha256(changes).hexdigest()[:8]
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True, timeout=10).stdout


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
