"""The page of a grid of 72 trials in a real browser: its first screen answers, and its settings are folded."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from results.report import write_report
from tests.browser.conftest import Open
from tests.support.grid import BUDGETS, GRID, write_grid

pytestmark = pytest.mark.browser
SCREEN = {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report([write_grid(tmp_path_factory.mktemp("grid"))]).html.as_uri()


def test_the_first_screen_has_the_answer_the_ranks_and_the_plot(open_page: Open, grid: str) -> None:
    page = open_page(grid, viewport=SCREEN)
    expect(page.get_by_role("heading", name="Use LoRA r=8 specific")).to_be_in_viewport()
    for line in page.locator("#overview tbody tr").all():
        expect(line).to_be_in_viewport(ratio=1)
    expect(page.locator("#overview tbody tr")).to_have_count(len(GRID))
    first = page.locator("#overview tbody tr").first
    assert first.locator("th").inner_text() == "LoRA r=8 specific"
    assert first.locator("td").first.inner_text().split("\n")[0].startswith("1.")
    expect(page.locator("#plot svg")).to_be_in_viewport(ratio=0.9)
    assert page.evaluate("document.documentElement.scrollHeight") < 2400


def test_every_cell_leads_to_its_row_and_every_setting_unfolds(open_page: Open, grid: str) -> None:
    page = open_page(grid, viewport=SCREEN)
    page.locator("#overview tbody tr", has_text="Full").locator("td.heat").last.click()
    drawer = page.get_by_role("dialog")
    expect(drawer).to_contain_text("examples=all")
    expect(drawer.get_by_role("heading", name="Full fine-tuning")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("details.setting")).to_have_count(len(BUDGETS))
    expect(page.locator("#board-1")).to_be_hidden()
    page.locator("details.setting summary", has_text="examples=256").click()
    expect(page.locator("#board-1 tbody tr")).to_have_count(len(GRID))
    expect(page.locator("#board-1")).to_be_visible()


def test_the_plot_shows_the_setting_that_is_chosen(open_page: Open, grid: str) -> None:
    page = open_page(grid, viewport=SCREEN)
    page.locator(".axes select[name=setting]").select_option("examples=all")
    expect(page.get_by_role("link", name="Full fine-tuning (rank 1)")).to_have_count(1)
    page.locator(".axes select[name=setting]").select_option("examples=64")
    expect(page.get_by_role("link", name="Full fine-tuning (rank 5)")).to_have_count(1)


@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(open_page: Open, grid: str, width: int) -> None:
    page = open_page(grid, viewport={"width": width, "height": 844}, color_scheme="dark")
    page.evaluate("document.querySelector('#effects > details').open = true")
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    assert found.violations_count == 0, found.generate_report()


def test_the_effect_of_every_axis_is_told(open_page: Open, grid: str) -> None:
    page = open_page(f"{grid}#effects", viewport=SCREEN)
    line = page.locator("#effects-table tr", has_text="rank").first
    expect(line).to_be_in_viewport()
    assert line.locator("td").nth(2).inner_text().split("\n")[0] == "+0.060"
    expect(line.locator("small.better")).to_have_count(1)
