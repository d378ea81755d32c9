"""The attention section in a browser: drawings and texts match the recorded numbers, and axe finds no problems."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from playwright.sync_api import Browser, Locator, Page

from results.page import attention as module
from results.page.attention import build_attention
from tests.support.attention import SIDE, TOKENS, attended_run, best_first, example_of, weights_of, write_attention

pytestmark = pytest.mark.browser
TEMPLATES = Path(module.__file__).parent / "templates"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The section alone on a page with the report's style: two methods, three examples; the second lacks the last."""
    folder = tmp_path_factory.mktemp("attended")
    board = attended_run(folder)
    second = best_first(board)[1].finished[0]
    tokens = ("</script>", "", " big", " b&w")
    examples = [example_of(f"test-{i}", folder / "pictures" / f"{i}.png", tokens=tokens) for i in range(2)]
    write_attention(folder, second, examples, [weights_of(10), weights_of(11)])
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    section = environment.get_template("sections/attention.html.j2").render(attention=build_attention(board))
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    path = folder / "page.html"
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Attention</title><style>{style}</style>'
        f"</head><body><main><h1>Attention</h1><section id='attention'>{section}</section></main></body></html>",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def page(chromium: Browser, file: Path) -> Iterator[Page]:
    page = chromium.new_page(viewport={"width": 1280, "height": 1400})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert problems == []


def sample(page: Page, index: int) -> Locator:
    return page.locator(f'[data-example="test-{index}"]')


def expected(weights_LHCN: Any) -> tuple[np.ndarray, str]:
    """Patches, and the sentence, of the mean over all leading dimensions."""
    mean = np.asarray(weights_LHCN, dtype=float).reshape(-1, SIDE * SIDE).mean(axis=0)
    row, column = divmod(int(mean.argmax()), SIDE)
    return mean, rf"the brightest patch (row {row + 1}, column {column + 1} of 4 × 4)"


def check_map(one: Locator, weights_LHCN: Any) -> None:
    mean, place = expected(weights_LHCN)
    text = one.locator(".sentence").inner_text()
    assert place in text
    share, brightest = (float(number) for number in re.findall(r"([\d.]+) %", text))
    assert share == pytest.approx(100 * mean.sum(), rel=5e-3)
    assert brightest == pytest.approx(100 * mean.max(), rel=1e-2)
    pixels = one.locator("canvas").evaluate(
        "(c) => [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    assert pixels[:2] == [SIDE, SIDE]
    drawn = np.array(pixels[2:]).reshape(-1, 4)
    wanted = module._COLOURS[np.round(255 * mean / mean.max()).astype(int)].astype(int)
    assert np.abs(drawn - wanted).max() <= 8  # steps of 1/255 in both, and the canvas keeps colours times opacity


def test_at_first_the_whole_captions_are_drawn(page: Page) -> None:
    for index in range(3):
        check_map(sample(page, index), weights_of(index))
    assert sample(page, 0).locator(".tokens button").all_inner_texts() == [token.strip() for token in TOKENS]
    label = sample(page, 0).locator("canvas").get_attribute("aria-label") or ""
    assert label.startswith("Heat map of the whole caption: ")
    assert page.locator("img.heat").count() == 0
    assert page.get_by_text("Selecting needs JavaScript").count() == 0
    box, picture = (sample(page, 0).locator(one).bounding_box() for one in ("canvas", ".map img"))
    assert box == pytest.approx(picture, abs=1)


def test_a_span_of_tokens_is_chosen_by_keyboard_and_mouse(page: Page) -> None:
    one = sample(page, 0)
    red, circle = one.locator(".tokens button").nth(1), one.locator(".tokens button").nth(2)
    red.focus()
    page.keyboard.press("Enter")
    assert red.get_attribute("aria-pressed") == "true"
    check_map(one, weights_of(0)[:, :, 1])
    circle.click()
    check_map(one, weights_of(0)[:, :, 1:3])
    assert "“red circle”" in (one.locator("canvas").get_attribute("aria-label") or "")
    check_map(sample(page, 1), weights_of(1))
    red.click()
    check_map(one, weights_of(0)[:, :, 2])
    page.get_by_role("button", name="Whole captions").click()
    check_map(one, weights_of(0))


def test_layers_and_heads_are_summed_or_single(page: Page) -> None:
    layer, head = page.get_by_label("Layer"), page.get_by_label("Head")
    assert layer.locator("option").all_inner_texts() == ["all 2 summed", "layer 1", "layer 2"]
    assert head.locator("option").all_inner_texts() == ["all 3 summed", "head 1", "head 2", "head 3"]
    layer.select_option("layer 2")
    check_map(sample(page, 0), weights_of(0)[1])
    head.select_option("head 3")
    check_map(sample(page, 0), weights_of(0)[1, 2])
    layer.select_option("all 2 summed")
    check_map(sample(page, 0), weights_of(0)[:, 2])


def test_another_method_has_its_own_caption_and_may_lack_an_example(page: Page) -> None:
    page.get_by_label("Method").select_option("LoRA r=4 specific, seed 0")
    check_map(sample(page, 1), weights_of(11))
    assert sample(page, 0).locator(".tokens button").all_inner_texts() == ["</script>", "·", "big", "b&w"]
    assert sample(page, 2).locator(".sentence").inner_text() == "Not recorded for this method."
    assert not sample(page, 2).locator("canvas").is_visible()
    page.get_by_label("Method").select_option("Full fine-tuning, seed 0")
    check_map(sample(page, 2), weights_of(2))


def test_the_picture_can_be_seen_without_the_map(page: Page) -> None:
    page.get_by_label("Strength of the map").fill("0")
    assert sample(page, 0).locator("canvas").evaluate("(c) => getComputedStyle(c).opacity") == "0"
    assert sample(page, 0).locator(".map img").evaluate("(i) => getComputedStyle(i).filter") == "grayscale(0)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    sample(page, 0).locator(".tokens button").first.click()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_javascript_a_map_is_there(chromium: Browser, file: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    still = sample(page, 0).locator("img.heat")
    assert still.is_visible()
    assert (still.get_attribute("alt") or "").startswith("Heat map of the whole caption: ")
    assert sample(page, 0).locator(".tokens").inner_text() == "".join(TOKENS)
    assert expected(weights_of(0))[1] in sample(page, 0).locator(".sentence").inner_text()
    assert not page.get_by_label("Layer").is_visible()
    assert page.get_by_text("Selecting needs JavaScript").is_visible()
    context.close()
