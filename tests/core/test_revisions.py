"""Git revisions of checkouts and of installed distributions."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.revisions import distribution_revision, git_revision


def installed(direct_url: object) -> Any:
    """A distribution whose installer wrote this ``direct_url.json``."""
    return SimpleNamespace(read_text=lambda _name: None if direct_url is None else json.dumps(direct_url))


def test_the_revision_is_that_of_this_checkout() -> None:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    if head.returncode:
        pytest.skip("not a git checkout")
    revision = git_revision(Path(__file__).parent)
    assert revision is not None
    assert head.stdout.strip().startswith(revision.partition("+")[0])
    editable = installed({"url": Path(__file__).parent.as_uri(), "dir_info": {"editable": True}})
    assert distribution_revision(editable) == revision


def test_a_changed_checkout_is_marked_and_a_plain_folder_has_no_revision(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    checkout = tmp_path / "with space"
    checkout.mkdir()
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "."],
    ):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    (checkout / "file").write_text("a")
    subprocess.run(["git", "add", "file"], cwd=checkout, check=True)
    revision = distribution_revision(installed({"url": checkout.as_uri(), "dir_info": {"editable": True}}))
    assert revision is not None
    assert re.fullmatch(r"[0-9a-f]{12}\+[0-9a-f]{8}", revision)
    git_revision.cache_clear()
    (checkout / "file").write_text("b")
    other = git_revision(checkout)
    assert other is not None
    assert other != revision, "other changes of the same revision are other code"
    assert other.partition("+")[0] == revision.partition("+")[0]


def test_an_installation_from_git_has_the_revision_of_its_commit() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    origin = {"url": "https://host/repo.git", "vcs_info": {"vcs": "git", "commit_id": commit}}
    assert distribution_revision(installed(origin)) == commit[:12]
    assert distribution_revision(installed({"url": "file:///wheel.whl", "archive_info": {}})) is None
    assert distribution_revision(installed(None)) is None
