"""The drawings: what is on them, how many there are, and that no name covers another (synthetic records)."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from harness.core.record import TrialRecord, read_run
from results.leaderboard.efficiency import EXAMPLES, MEMORY, PARAMETERS, TIME, build_efficiency
from results.leaderboard.sweeps import build_sweeps
from results.leaderboard.table import Leaderboard, build_leaderboard
from results.page.plots import all as plots_module
from results.page.plots.all import EXAMPLES_DRAWN, MOST_DRAWN, Drawings, all_plots
from results.page.plots.pareto import Box, Name, cost_ticks, pareto_figure, place, tick_text
from results.page.plots.style import MOST_PANELS, STYLE, log_ticks, looks_of
from results.page.plots.sweeps import option_sweeps, sweep_figure
from tests.support.sweeps import METHODS, write_sweep

RANKS = tuple(
    (f"LoRA r={rank}", "lora", grouping, {"rank": rank, "dropout": 0.0}, 10_000 * rank * (1 + number))
    for rank in (2, 8)
    for number, grouping in enumerate(("agnostic", "specific"))
)


def crossing(budget: int, epochs: int, method: str, grouping: str, seed: int) -> float:
    gain = {"none": 0.0, "lora": 0.05, "full": 0.1}[method] * (budget / 64) ** 0.5
    return 0.3 + gain - (0.1 if method == "full" else 0) + 0.002 * seed


def board_of(folder: Path, **options: object) -> Leaderboard:
    given = {"methods": (METHODS[0], *RANKS, METHODS[-1]), "seeds": (0, 1), **options}
    return build_leaderboard(read_run(write_sweep(folder, crossing, **given)))


def drawn(board: Leaderboard) -> dict[str, Drawings]:
    return all_plots(board, build_sweeps(board), build_efficiency(board))


def texts(svg: str) -> list[str]:
    return [
        " ".join("".join(one.itertext()).split()) for one in ElementTree.fromstring(svg).iter() if "text" in one.tag
    ]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    return board_of(tmp_path_factory.mktemp("run"), budgets=(64, 1024))


@pytest.fixture(scope="module")
def found(board: Leaderboard) -> dict[str, Drawings]:
    return drawn(board)


def test_every_kind_is_drawn_and_titled(found: dict[str, Drawings]) -> None:
    counts = {"contexts": 2, "parameters": 2, "curves": 2, "input": 2, "sweeps": 1, "options": 2, "pareto": 5}
    assert {name: len(drawings) for name, drawings in found.items()} == counts
    assert not any(drawings.left_out for drawings in found.values())
    titles = [plot.title for drawings in found.values() for plot in drawings]
    assert len(set(titles)) == len(titles)
    assert "Test CIDEr against the number of training examples" in titles
    assert "Test CIDEr against lora's rank (examples=64)" in titles


def test_every_drawing_is_well_formed_themed_text_with_ids_of_its_own(found: dict[str, Drawings]) -> None:
    ids: list[str] = []
    for plot in itertools.chain.from_iterable(found.values()):
        ElementTree.fromstring(plot.svg)
        ids += re.findall(r' id="([^"]+)"', plot.svg)
        assert "<text" in plot.svg
        assert "currentColor" in plot.svg
        assert not re.search("#01020|#04050|#07080", plot.svg)
    assert len(set(ids)) == len(ids)


def test_every_axis_of_scores_says_which_way_is_better(found: dict[str, Drawings]) -> None:
    for name, drawings in found.items():
        for plot in drawings:
            words = " ".join(texts(plot.svg))
            assert ("lower is better" if name in {"curves", "input"} else "higher is better") in words, plot.title
            if name in {"parameters", "pareto"}:  # costs on the other axis
                assert "lower is better" in words, plot.title


def test_the_same_board_gives_the_same_drawings(board: Leaderboard, found: dict[str, Drawings]) -> None:
    assert drawn(board) == found


def test_no_more_are_drawn_than_allowed_and_the_others_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots_module, "svg", lambda figure, name: name)
    budgets = [64 * number for number in range(1, MOST_DRAWN + 3)]
    found = drawn(board_of(tmp_path, budgets=budgets, seeds=(0,)))
    for name in ("contexts", "parameters", "curves", "input", "options"):
        assert (len(found[name]), found[name].left_out) == (EXAMPLES_DRAWN, MOST_DRAWN + 2 - EXAMPLES_DRAWN)
    assert (len(found["pareto"]), found["pareto"].left_out) == (
        2 * EXAMPLES_DRAWN + 1,
        2 * (MOST_DRAWN + 2 - EXAMPLES_DRAWN),
    )
    allowed = drawn(board_of(tmp_path / "fewer", budgets=budgets[:MOST_DRAWN], seeds=(0,)))
    assert (len(allowed["curves"]), allowed["curves"].left_out) == (MOST_DRAWN, 0)
    assert len(found["sweeps"]) == 1


def test_panels_that_are_left_out_are_counted_in_the_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots_module, "svg", lambda figure, name: name)
    methods = [(f"LoRA r={rank}", "lora", "specific", {"rank": rank}, rank) for rank in range(1, 13)]
    found = drawn(board_of(tmp_path, methods=[*methods, METHODS[-1]], seeds=(0,)))
    assert found["sweeps"].plots[0].title.endswith(f"; the first {MOST_PANELS} of 12 methods")


def test_the_crossovers_are_marked_where_they_are(board: Leaderboard) -> None:
    (sweep,) = build_sweeps(board)
    with mpl.rc_context(STYLE):
        figure = sweep_figure(sweep, board.primary, looks_of(board))
    marked = [
        float(line.get_xdata()[0])
        for axes in figure.axes
        for line in axes.lines
        if line.get_marker() == "^" and len(line.get_xdata()) == 1
    ]
    expected = [one.crossover.at for one in sweep.curves if one.crossover]
    assert len(expected) == 5
    assert sorted(marked) == pytest.approx(sorted(at for at in expected if 64 <= at <= 1024))
    assert marked


def test_rank_sweeps_hold_all_else_equal(board: Leaderboard) -> None:
    first, second = option_sweeps(board)
    assert (first.setting, first.method, first.option, first.values) == ("examples=64", "lora", "rank", [2, 8])
    assert second.setting == "examples=all"
    assert [[row.name for _, row in line] for line in first.lines.values()] == [
        [f"LoRA r={rank} {grouping}" for rank in (2, 8)]
        for grouping in dict.fromkeys(grouping for grouping, _ in first.lines)
    ]


def test_an_option_that_varies_with_another_is_no_sweep(tmp_path: Path) -> None:
    methods = [(f"LoRA {rank}", "lora", "specific", {"rank": rank, "dropout": rank / 10}, 10) for rank in (2, 4)]
    assert list(option_sweeps(board_of(tmp_path, methods=[*methods, METHODS[-1]], budgets=(64,)))) == []


def test_the_front_is_a_line_of_steps_through_its_points(board: Leaderboard) -> None:
    front = build_efficiency(board).settings[0].fronts[0]
    with mpl.rc_context(STYLE):
        figure = pareto_figure(front, board.primary, looks_of(board))
    line = next(line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post")
    on_front = [(one.cost, one.quality.mean) for one in front.points if one.on_front]
    assert line.get_xydata()[:-1].tolist() == [list(one) for one in on_front]
    assert len(on_front) > 2


def test_nothing_trained_has_its_place_on_a_logarithmic_axis(tmp_path: Path) -> None:
    def untrained(record: TrialRecord) -> TrialRecord:
        assert record.parameters is not None
        if record.spec["adapter"]["method"] != "none":
            return record
        return record.model_copy(update={"parameters": record.parameters.model_copy(update={"trainable": 0})})

    board = board_of(tmp_path, budgets=(64,), change=untrained)
    front = build_efficiency(board).settings[0].fronts[0]
    with mpl.rc_context(STYLE):
        axes = pareto_figure(front, board.primary, looks_of(board)).axes[0]
    assert axes.get_xscale() == "symlog"
    assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1]
    assert 0 in axes.get_xticks()


def test_names_cover_neither_points_nor_each_other() -> None:
    centres = [(40.0 + 9 * number, 60.0 + 7 * (number % 5)) for number in range(20)]
    names = [Name(f"method {number}", -1, 1) for number in range(12)]
    inside = Box(0, 0, 300, 200)
    found = place(inside, centres, names)
    boxes = [box for box in found if box is not None]
    assert len(found) == 12
    assert 3 < len(boxes) < 12
    assert all(inside.holds(box) for box in boxes)
    assert not any(one.meets(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.distance(x, y) < 4 for box in boxes for x, y in centres)
    for centre, box in zip(centres, found, strict=False):
        assert box is None or min(centres, key=lambda other: box.distance(*other)) == centre


def test_ticks_of_costs_are_round_in_their_unit() -> None:
    mebibyte = 1024**2
    assert [tick_text(tick, MEMORY) for tick in cost_ticks(43 * mebibyte, 52 * mebibyte, MEMORY)][:2] == [
        "42 MiB",
        "43.5 MiB",
    ]
    assert [tick_text(tick, TIME) for tick in cost_ticks(10, 4000, TIME)] == ["10 s", "20 s", "30 s", "1 min", "2 min",
        "5 min", "10 min", "20 min", "30 min", "1 h"][:: 2]  # fmt: skip
    assert [tick_text(tick, PARAMETERS) for tick in cost_ticks(9_000, 90_000, PARAMETERS)] == ["10k", "20k", "50k"]
    assert len(cost_ticks(150_000, 1_500_000, TIME)) > 2  # days
    assert cost_ticks(10, 500, EXAMPLES, zero=True)[:2] == [0, 10]


def test_logarithmic_ticks_are_three_or_more() -> None:
    assert log_ticks(1, 1000) == [1, 10, 100, 1000]
    assert log_ticks(9_000, 600_000) == [10_000, 20_000, 50_000, 100_000, 200_000, 500_000]
    assert len(log_ticks(7.1, 7.4)) > 2
    assert log_ticks(6, 21) == pytest.approx([7, 10, 15, 20])
