"""A headless Chromium that shows the report of a synthetic run. Skipped if Chromium is not installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from results.report import write_report
from tests.support.rich_run import write_rich_run

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
Open = Callable[..., Page]  # of an address, with options of Browser.new_context


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The system's Chromium, or the one that the variable CHROMIUM names."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium: install the package chromium, or name a program with CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything in it."""
    return write_report([write_rich_run(tmp_path_factory.mktemp("run"))]).html


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Open]:
    """Opens a file. At the end, checks that no page logged an error or requested anything but itself."""
    problems: list[str] = []
    asked: list[str] = []
    contexts = []

    def visit(address: str, **options: Any) -> Page:
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert len({url.partition("?")[0].partition("#")[0] for url in asked if url.startswith("file:")}) <= 1
