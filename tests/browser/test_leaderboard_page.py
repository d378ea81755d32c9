"""The leaderboard in a real browser: sorted, filtered, its columns chosen, and shown again by a link."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open
from tests.support.rich_run import SETTINGS

pytestmark = pytest.mark.browser
ALL = 16  # rows of two settings, four of them not ranked


def column(page: Page, table: str, key: str) -> list[str]:
    """What a column of a table shows, in the order shown, without what is beneath the number."""
    place = page.locator(f"#{table} th[data-key='{key}']").evaluate("heading => heading.cellIndex + 1")
    rows = page.locator(f"#{table} tbody tr:visible > :nth-child({place})").all_inner_texts()
    return [text.split("\n")[0].strip() for text in rows]


def heading(page: Page, table: str, key: str) -> None:
    page.locator(f"#{table} th[data-key='{key}'] button").click()


def sorted_as(page: Page, table: str, key: str) -> str | None:
    return page.locator(f"#{table} th[data-key='{key}']").get_attribute("aria-sort")


def test_the_first_click_shows_the_best_first(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    by_rank = column(page, "board-0", "cider")
    assert [float(text) for text in by_rank] == sorted(map(float, by_rank), reverse=True)
    assert sorted_as(page, "board-0", "cider") == "descending"
    heading(page, "board-0", "cider")
    assert column(page, "board-0", "cider") == by_rank[::-1]
    assert sorted_as(page, "board-0", "cider") == "ascending"
    heading(page, "board-0", "trainable")
    assert sorted_as(page, "board-0", "trainable") == "ascending"
    cheapest = ["9.31k", "10.8k", "12.4k", "13.2k", "17k", "45k", "80.7k", "561k"]
    assert column(page, "board-0", "trainable") == cheapest
    heading(page, "board-0", "trainable")
    assert column(page, "board-0", "trainable") == cheapest[::-1]
    assert page.locator("#board-0 th[aria-sort]").count() == 1
    heading(page, "board-0", "cider")
    assert column(page, "board-0", "cider") == by_rank
    assert column(page, "board-1", "cider") == sorted(column(page, "board-1", "cider"), key=float, reverse=True)


def test_text_is_sorted_as_text_by_the_keyboard(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    page.locator("#board-1 th").get_by_role("button", name="Method").focus()
    page.keyboard.press("Enter")
    names = [name.partition(" ")[0] for name in column(page, "board-1", "method")]
    assert names == ["BitFit", "BitFit", "Full", "IA3", "IA3", "LoRA", "LoRA", "none"]


def test_what_is_missing_stays_last(open_page: Open, report: Path) -> None:
    page = open_page(f"{report.as_uri()}#search")
    for direction in ("ascending", "descending"):
        heading(page, "search-table", "validation")
        assert sorted_as(page, "search-table", "validation") == direction
        shown = column(page, "search-table", "validation")
        numbers = [text for text in shown if text != "–"]
        assert 0 < len(numbers) < len(shown)
        assert shown == [*numbers, *["–"] * (len(shown) - len(numbers))]
        values = [float(text.split()[0]) for text in numbers]
        assert values == sorted(values, reverse=direction == "descending")


def test_words_filter_every_table_of_the_leaderboard(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    found, field = page.locator("#leaderboard [role=status]"), page.get_by_label("Find rows")
    expect(found).to_have_text(f"{ALL} rows")
    field.fill("LORA spec")
    expect(found).to_have_text(f"2 of {ALL} rows match")
    for table in ("overview", "board-0", "board-1"):
        assert column(page, table, "method") == ["LoRA r=4 specific"]
    field.fill("lora examples=1024")
    expect(found).to_have_text(f"2 of {ALL} rows match")
    expect(page.locator("#board-0")).to_be_hidden()
    expect(page.locator("#board-1")).to_be_visible()
    field.fill("nothing has this name")
    expect(found).to_have_text(f"0 of {ALL} rows match")
    field.fill("")
    expect(found).to_have_text(f"{ALL} rows")
    expect(page.locator("#board-0")).to_be_visible()


def test_columns_are_chosen_and_the_table_as_shown_is_a_file(open_page: Open, report: Path, tmp_path: Path) -> None:
    page = open_page(report.as_uri())
    speed = page.locator("#board-0 th[data-key=examples_per_s]")
    expect(speed).to_be_hidden()
    page.get_by_text("Columns", exact=True).click()
    page.get_by_role("checkbox", name="Examples/s").check()
    page.get_by_role("checkbox", name="Trainable", exact=True).uncheck()
    page.keyboard.press("Escape")
    expect(page.get_by_role("checkbox", name="Examples/s")).to_be_hidden()
    expect(speed).to_be_visible()
    expect(page.locator("#board-0 th[data-key=trainable]")).to_be_hidden()
    again = open_page(page.url)
    expect(again.locator("#board-0 th[data-key=examples_per_s]")).to_be_visible()
    expect(again.locator("#board-0 th[data-key=trainable]")).to_be_hidden()

    page.get_by_text("Download", exact=True).click()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="the table as shown").click()
    waiting.value.save_as(tmp_path / "shown.csv")
    lines = list(csv.reader((tmp_path / "shown.csv").open(encoding="utf-8")))
    board = next(number for number, line in enumerate(lines) if line[0] == "Rank")
    assert lines[board][:3] == ["Rank", "Method", "CIDEr"]
    assert "Examples/s" in lines[board]
    assert "Trainable" not in lines[board]
    speeds = [float(line[lines[board].index("Examples/s")]) for line in lines[board + 1 : board + 9]]
    assert min(speeds) > 250


def test_a_link_shows_the_same(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    page.get_by_label("Find rows").fill("specific")
    heading(page, "board-0", "trainable")
    shown = column(page, "board-0", "method")
    assert [name.partition(" ")[0] for name in shown] == ["IA3", "BitFit", "LoRA"]
    again = open_page(page.url)
    expect(again.get_by_label("Find rows")).to_have_value("specific")
    expect(again.locator("#leaderboard [role=status]")).to_have_text(f"6 of {ALL} rows match")
    assert column(again, "board-0", "method") == shown
    assert sorted_as(again, "board-0", "trainable") == "ascending"


def test_rows_that_may_not_be_compared_stay_in_their_place_unranked_with_the_reason(
    open_page: Open, report: Path
) -> None:
    page = open_page(report.as_uri())
    for number in range(len(SETTINGS)):
        ranks = dict(
            zip(column(page, f"board-{number}", "method"), column(page, f"board-{number}", "rank"), strict=True)
        )
        assert {name for name, rank in ranks.items() if rank == "–"} == {"BitFit specific", "BitFit agnostic"}
        scores = [float(text) for text in column(page, f"board-{number}", "cider")]
        assert scores == sorted(scores, reverse=True)
        rows = page.locator(f"#board-{number} tr.apart")
        expect(rows).to_have_count(2)
        expect(rows.first).to_contain_text(
            "not ranked: learning-rate search effort differs (3 tried, Full fine-tuning 2)"
        )
