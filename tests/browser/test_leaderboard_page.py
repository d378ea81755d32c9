"""The leaderboard in a real browser: sorted, filtered, and shown again by a link."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open
from tests.support.rich_run import SETTINGS

pytestmark = pytest.mark.browser
ALL = 16  # rows of two settings, four of them apart


def column(page: Page, table: str, number: int) -> list[str]:
    """What a column of a table shows, in the order shown, without what is beneath the number."""
    rows = page.locator(f"#{table} tbody tr:visible > :nth-child({number})").all_inner_texts()
    return [text.split("\n")[0].strip() for text in rows]


def heading(page: Page, table: str, name: str) -> None:
    page.locator(f"#{table} th").get_by_role("button", name=name).click()


def test_numbers_are_sorted_as_numbers_in_both_directions(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    by_rank = column(page, "board-0", 4)
    assert [float(text) for text in by_rank] == sorted(map(float, by_rank), reverse=True)
    heading(page, "board-0", "CIDEr ▲")
    assert column(page, "board-0", 4) == by_rank[::-1]
    expect(page.locator("#board-0 th[data-key=cider]")).to_have_attribute("aria-sort", "ascending")
    heading(page, "board-0", "CIDEr ▲")
    assert column(page, "board-0", 4) == by_rank
    heading(page, "board-0", "Trainable")
    assert column(page, "board-0", 9) == ["9,312", "10,848", "12,384", "45,000", "80,688", "561,312"]
    assert page.locator("#board-0 th[aria-sort]").count() == 1
    assert column(page, "board-1", 4) == sorted(column(page, "board-1", 4), key=float, reverse=True)


def test_text_is_sorted_as_text_by_the_keyboard(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    page.locator("#board-1 th").get_by_role("button", name="Method").focus()
    page.keyboard.press("Enter")
    names = column(page, "board-1", 2)
    assert names == [
        "Full fine-tuning",
        "IA3 agnostic",
        "IA3 specific",
        "LoRA r=4 agnostic",
        "LoRA r=4 specific",
        "none",
    ]


def test_what_is_missing_stays_last(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    for direction in ("ascending", "descending"):
        heading(page, "search-table", "Validation perplexity")
        expect(page.locator("#search-table th[data-key=validation]")).to_have_attribute("aria-sort", direction)
        shown = column(page, "search-table", 5)
        numbers = [text for text in shown if text != "–"]
        assert 0 < len(numbers) < len(shown)
        assert shown == [*numbers, *["–"] * (len(shown) - len(numbers))]
        values = [float(text.split()[0]) for text in numbers]
        assert values == sorted(values, reverse=direction == "descending")


def test_words_filter_every_table_of_the_leaderboard(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    found = page.locator("#leaderboard [role=status]")
    expect(found).to_have_text(f"{ALL} of {ALL} rows match")
    page.get_by_label("Find").fill("LORA spec")
    expect(found).to_have_text(f"2 of {ALL} rows match")
    for table in ("board-0", "board-1"):
        assert column(page, table, 2) == ["LoRA r=4 specific"]
    assert column(page, "differences-0", 1) == ["LoRA r=4 specific"]
    expect(page.locator("#apart-0")).to_be_hidden()
    page.get_by_label("Find").fill("bitfit")
    assert column(page, "apart-0", 1) == ["BitFit specific", "BitFit agnostic"]
    expect(page.locator("#board-0")).to_be_hidden()
    page.get_by_label("Find").fill("nothing has this name")
    expect(found).to_have_text(f"0 of {ALL} rows match")
    page.get_by_role("button", name="Show all").first.click()
    expect(found).to_have_text(f"{ALL} of {ALL} rows match")
    expect(page.locator("#board-0")).to_be_visible()


def test_setting_and_method_are_chosen(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    form = page.locator("#leaderboard form")
    form.get_by_label("Setting").select_option(SETTINGS[1])
    expect(page.locator("#board-0")).to_be_hidden()
    expect(form.get_by_role("status")).to_have_text(f"8 of {ALL} rows match")
    form.get_by_label("Method").select_option("IA3")
    assert column(page, "board-1", 2) == ["IA3 specific", "IA3 agnostic"]


def test_a_link_shows_the_same(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    page.get_by_label("Find").fill("specific")
    page.locator("#leaderboard").get_by_label("Setting").select_option(SETTINGS[0])
    heading(page, "board-0", "Perplexity")
    heading(page, "board-0", "Perplexity")
    heading(page, "search-table", "Learning rate")
    shown = [column(page, table, 2) for table in ("board-0", "search-table")]
    assert shown[0] == ["IA3 specific", "LoRA r=4 specific"]

    again = open_page(page.url)
    expect(again.get_by_label("Find")).to_have_value("specific")
    expect(again.locator("#leaderboard").get_by_label("Setting")).to_have_value(SETTINGS[0])
    expect(again.locator("#leaderboard [role=status]")).to_have_text(f"3 of {ALL} rows match")
    assert [column(again, table, 2) for table in ("board-0", "search-table")] == shown
    expect(again.locator("#board-0 th[data-key=perplexity]")).to_have_attribute("aria-sort", "descending")


def test_rows_that_may_not_be_compared_are_never_ranked(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    for number in range(len(SETTINGS)):
        assert not any("BitFit" in name for name in column(page, f"board-{number}", 2))
        apart = page.locator(f"#apart-{number}")
        assert "Rank" not in apart.locator("thead").inner_text()
        expect(apart.locator("tbody tr")).to_have_count(2)
        expect(apart).to_contain_text("learning-rate search effort differs (3 tried, Full fine-tuning 2)")
