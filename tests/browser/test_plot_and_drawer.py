"""The interactive plot and the drawer in a real browser: axes, hover, click, keyboard, links, outliers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from harness.core.record import PlannedTrial, TrialRecord
from results.report import write_report
from tests.browser.conftest import Open
from tests.support.runs import fake_plan, write_run

pytestmark = pytest.mark.browser


def points(page: Page) -> list[str]:
    return [str(one.get_attribute("aria-label")) for one in page.locator("#plot a").all()]


def test_axes_are_chosen_and_the_points_follow(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    assert any(
        re.fullmatch(r"LoRA r=4 specific \(rank \d\), CIDEr 1\.03 \[.*\], Trainable 80\.7k", one)
        for one in points(page)
    )
    form = page.locator("form.axes")
    form.locator("select[name=y]").select_option("Perplexity")
    form.locator("select[name=x]").select_option("Examples/s")
    assert any(
        re.match(r"LoRA r=4 specific \(rank \d\), Perplexity 5\.\d+ .*, Examples/s 305", one) for one in points(page)
    )
    assert len(points(page)) == 8
    assert "Perplexity: lower is better" in page.locator("#plot").inner_text()


def test_an_axis_is_logarithmic_where_costs_are_far_apart_until_it_is_switched(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    log = page.locator("form.axes").get_by_label("log cost")
    expect(log).to_be_checked()
    between = page.get_by_role("link", name="LoRA r=4 specific (rank").locator("path")
    left = "point => point.getBoundingClientRect().left"
    before = between.evaluate(left)
    log.uncheck()
    assert between.evaluate(left) < before - 50


def test_a_point_is_read_by_the_pointer_and_opened_by_click_and_keyboard(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    point = page.get_by_role("link", name="Full fine-tuning (rank")
    point.hover()
    expect(page.locator("#plot")).to_contain_text("Trainable 561k")
    point.click()
    drawer = page.get_by_role("dialog", name="Full fine-tuning")
    expect(drawer).to_be_visible()
    drawer.get_by_role("button", name="Close").click()
    expect(drawer).to_be_hidden()
    page.get_by_role("link", name="none (rank").focus()
    expect(page.locator("#plot")).to_contain_text("Trainable 9.31k")
    point.focus()
    page.keyboard.press("Enter")
    expect(drawer).to_be_visible()


def test_the_drawer_has_trials_curve_and_samples(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    page.locator("#board-1 tbody tr", has_text="LoRA r=4 specific").locator("td").nth(1).click()
    drawer = page.get_by_role("dialog", name="LoRA r=4 specific")
    record = drawer.get_by_role("link", name="record").first
    path = (report.parent / str(record.get_attribute("href"))).resolve()
    assert path.name == "record.json"
    assert path.exists()
    expect(drawer.get_by_role("img", name="Validation perplexity by epoch")).to_be_visible()
    expect(drawer).to_contain_text("LoRA r=4 sees a circle left of a square")
    expect(drawer.locator("img").first).to_be_visible()
    drawer.get_by_text("All numbers and options").click()
    expect(drawer).to_contain_text("Optimizer state")
    found = Axe().run(page, context="#drawer", options={"resultTypes": ["violations"]})
    assert found.violations_count == 0, found.generate_report()


def test_a_row_that_is_not_ranked_says_why_in_its_drawer(open_page: Open, report: Path) -> None:
    page = open_page(report.as_uri())
    page.locator("#board-0").get_by_role("link", name="BitFit specific").click()
    expect(page.get_by_role("dialog")).to_contain_text("Not ranked: learning-rate search effort differs")


def test_what_is_far_worse_stands_at_the_frame_with_its_value(open_page: Open, tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        worse = record.metrics["test"] | {
            "perplexity": 47.0 + trial.seed if trial.method == "none" else 3 + 0.1 * trial.seed
        }
        return record.model_copy(update={"metrics": {**record.metrics, "test": worse}})

    page = open_page(write_report([write_run(tmp_path, fake_plan(primary_metric="perplexity"), change)]).html.as_uri())
    expect(page.locator("#plot")).to_contain_text("none 47.5 ↑")
    ticks = [float(text) for text in re.findall(r"^\d\.\d+$", page.locator("#plot").inner_text(), re.MULTILINE)]
    assert ticks
    assert max(ticks) < 5
