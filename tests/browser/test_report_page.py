"""The page as a whole in a real browser: theme, links, phone, paper, no network, and the accessibility check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open
from tests.support.rich_run import rich_plan

pytestmark = pytest.mark.browser
# What repeats as it is would only take axe's time.
ALIKE = "tbody tr:nth-child(n+4), .sample:nth-child(n+2), figure:nth-child(n+2), .setting:nth-of-type(n+2)"
PHONE = {"width": 390, "height": 844}


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_the_theme_follows_the_system_until_it_is_chosen(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri(), color_scheme="dark")
    dark = background(page)
    page.emulate_media(color_scheme="light")
    light = background(page)
    assert light != dark
    themes = page.get_by_role("group", name="Theme")
    expect(themes.get_by_role("button", name="Auto")).to_have_attribute("aria-pressed", "true")
    themes.get_by_role("button", name="Dark").click()
    assert background(page) == dark
    expect(themes.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")
    expect(themes.get_by_role("button", name="Auto")).to_have_attribute("aria-pressed", "false")
    page.reload()
    assert background(page) == dark
    themes.get_by_role("button", name="Auto").click()
    assert background(page) == light


@pytest.mark.parametrize(
    ("theme", "width", "rules"),
    [
        ("light", 1280, {}),
        ("dark", 1280, {"runOnly": ["color-contrast"]}),
        ("light", 390, {"rules": {"color-contrast": {"enabled": False}}}),
    ],
)
def test_axe_finds_nothing(open_page: Open, report: Path, theme: str, width: int, rules: dict[str, Any]) -> None:
    page = open_page(report.as_uri(), color_scheme=theme, viewport={"width": width, "height": 900})
    page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
    page.evaluate(f"for (const one of document.querySelectorAll({ALIKE!r})) one.remove()")
    found = Axe().run(page, options={"resultTypes": ["violations"], **rules})
    assert found.violations_count == 0, found.generate_report()


def test_axe_would_find_pale_text(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    page.evaluate("document.documentElement.style.setProperty('--soft', '#bbb')")
    found = Axe().run(page, context="#leaderboard", options={"runOnly": ["color-contrast"]})
    assert [one["id"] for one in found.response["violations"]] == ["color-contrast"]


def test_a_link_to_a_trial_opens_its_row(open_page: Open, report: Path) -> None:
    trial = rich_plan().trials[-1].trial_id
    page = open_page(f"{report.as_uri()}#trial-{trial}")
    row = page.locator(f"[id='trial-{trial}']")
    expect(row).to_be_in_viewport()
    other = page.locator("#trials tbody tr").first
    colours = [
        one.locator("td").first.evaluate("cell => getComputedStyle(cell).backgroundColor") for one in (row, other)
    ]
    assert colours[0] != colours[1]


def test_every_row_leads_to_its_trials(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    expect(page.locator("#trials-table")).to_be_hidden()
    page.locator("#board-0").get_by_role("link", name="LoRA r=4 specific").click()
    drawer = page.get_by_role("dialog", name="LoRA r=4 specific")
    expect(drawer).to_be_visible()
    expect(drawer.get_by_role("link", name="record")).to_have_count(3)
    expect(drawer).to_contain_text("rank 2")
    page.keyboard.press("Escape")
    expect(drawer).to_be_hidden()
    page.get_by_text("The trials whose learning rate did not go on").evaluate("e => e.closest('details').open = true")
    for status in ("failed", "pruned"):
        page.locator(f"#{status} tbody tr").get_by_role("link").click()
        expect(page.locator("#trials tr:target")).to_contain_text(status)


def test_nothing_is_wider_than_a_phone(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri(), viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    too_wide = "[...document.querySelectorAll('main section > *:not(.scroll)')].filter(e => e.scrollWidth > 390).length"
    assert page.evaluate(too_wide) == 0
    assert page.evaluate(
        "[...document.querySelectorAll('.plot svg, #plot svg')].every(e => e.getBoundingClientRect().right <= 390)"
    )


def test_paper_has_the_leaderboard_and_no_controls(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri(), color_scheme="dark", viewport={"width": 1032, "height": 720})
    page.get_by_role("button", name="Dark").click()
    page.emulate_media(media="print")
    for control in ("nav", ".themes", "#leaderboard input", ".menu >> nth=0", ".axes", "#trials"):
        expect(page.locator(control).first).to_be_hidden()
    expect(page.locator("#board-0")).to_be_visible()
    assert background(page) == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1032
    page.emulate_media(media="screen")
    expect(page.locator("nav")).to_be_visible()


def test_without_scripts_everything_is_there_to_read(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri(), java_script_enabled=False)
    expect(page.locator("#board-0 tbody tr")).to_have_count(8)
    expect(page.locator("#board-0")).to_be_visible()
    for control in (".themes", "#leaderboard input", ".axes", "#drawer"):
        expect(page.locator(control).first).to_be_hidden()
    expect(page.locator("noscript svg").first).to_be_visible()
    page.locator("#provenance > details > summary").click()
    page.locator("#trials summary").click()
    expect(page.locator("#trials tbody tr").last).to_be_visible()


def test_captions_are_data(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    assert page.title() == "synthetic: leaderboard"
    expect(page.locator("#samples")).to_contain_text("<script>document.title")
