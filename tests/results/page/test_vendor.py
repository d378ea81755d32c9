"""The libraries that the page carries are the ones that the list beside them names, each with its licence."""

from __future__ import annotations

import hashlib
import re

import pytest

from results.page import page as module
from results.page.page import library

VENDOR = module._VENDOR


def test_every_library_is_the_listed_version_with_its_licence() -> None:
    listed = re.findall(
        r"\| `(\S+\.min\.js)` \| `(\S+)` (\S+), .*\(`(LICENSE-\w+)`\) \| `(\w{64})` \|",
        (VENDOR / "README.md").read_text(),
    )
    assert {name for name, *_ in listed} == {path.name for path in VENDOR.glob("*.js")}
    for name, package, version, licence, digest in listed:
        code = (VENDOR / name).read_bytes()
        assert hashlib.sha256(code).hexdigest() == digest, name
        assert version in code[:200].decode(), package
        assert "Permission to use, copy" in (VENDOR / licence).read_text()


def test_the_licence_stands_before_the_code_in_the_page() -> None:
    text = library("plot")
    assert text.index("Copyright 2020-2025 Observable") < text.index("Permission to use") < text.index("!function")


def test_code_that_would_end_its_script_is_refused(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = module.Path(str(tmp_path))
    (folder / "LICENSE-bad").write_text("free")
    (folder / "bad.min.js").write_text("'</SCRIPT>'")
    monkeypatch.setattr(module, "_VENDOR", folder)
    with pytest.raises(ValueError, match=r"vendor/bad\.min\.js: ends a script"):
        library("bad")
