"""The live table of a sweep, and the lines where there is no terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from harness.core.record import PlannedTrial, TrialRecord
from harness.sweep.live import QUIET_S, SHOWN_TRIALS, LiveTable, trial_name, trial_names
from tests.support.runs import fake_record
from tests.support.screens import console, output, shown

pytestmark = pytest.mark.quick


def planned(number: int, **changes: Any) -> PlannedTrial:
    fields: dict[str, Any] = {"label": f"LoRA r={number}", "method": "lora", "grouping": "specific", "setting": ""}
    return PlannedTrial(trial_id=f"t{number}", seed=0, **fields | changes)


def record(trial: PlannedTrial, **changes: Any) -> TrialRecord:
    return fake_record(trial, 30_000, 0.9).model_copy(update=changes)


def table(count: int, already: int = 0, terminal: bool = True) -> LiveTable:
    return LiveTable(console(terminal=terminal), [planned(n) for n in range(count)], already)


def running(live: LiveTable, number: int, fraction: float, **progress: Any) -> None:
    live.started(f"t{number}", f"t{number}")
    live.progressed(f"t{number}", {"phase": "train", "fraction": fraction, **progress})


def trials_in(text: str) -> list[str]:
    return re.findall(r"LoRA r=(\d+) ", text)


def test_the_live_table_counts_and_estimates() -> None:
    live = table(4, already=12)
    assert "0 of 4 trials, 12 finished earlier, 0 failed" in shown(live)
    assert "estimating remaining time" in shown(live)
    running(live, 0, 0.5, epoch=2, train_loss=1.25, validation_perplexity=5.5)
    running(live, 1, 1.0)
    live.ended(record(planned(1), metrics={"test": {"perplexity": 4.25}}, wall_time_s=3.0))
    running(live, 2, 0.5)
    live.ended(record(planned(2), status="out_of_memory", reason="too large", metrics={}))
    text = shown(live, width=120)
    assert "2 of 4 trials, 12 finished earlier, 1 failed" in text
    assert re.search(r"about [\d.]+ s left", text)
    assert re.search(r"LoRA r=0 specific +0 +train +2 +1\.250 +5\.500", text)
    assert "test 4.250 in 3.0 s" in text
    assert "out_of_memory: too large" in text
    assert "LoRA r=3" not in text  # it waits


def test_in_eighty_characters_a_long_name_is_cut_and_no_number() -> None:
    trial = planned(4, setting="task=scenes language_model=builtin/tiny-llama examples=1024 epochs=8")
    live = LiveTable(console(terminal=True), [trial], 0)
    running(live, 4, 0.5, epoch=12, train_loss=1.25, validation_perplexity=12345.678)
    lines = shown(live, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"^LoRA r=4 \S*… +0 +train +12 +1\.250 +12345\.678 +━", lines[-1])
    live.ended(record(trial, metrics={"test": {"perplexity": 4.25}}, wall_time_s=83.0))
    cut = shown(live, width=80)
    assert max(map(len, cut.splitlines())) <= 80
    assert "12345.678  test 4.250 in 1 min 23…" in cut
    assert "test 4.250 in 1 min 23 s" in shown(live, width=140)


def test_time_left_is_in_proportion_to_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("harness.sweep.live.time.monotonic", lambda: now[0])
    live = table(4)
    running(live, 0, 1.0)
    now[0] += 60
    # A quarter of the grid took a minute.
    assert "0 of 4 trials, 0 failed · 1 min 00 s · about 3 min 00 s left" in shown(live)


def test_progress_keeps_what_a_message_leaves_out() -> None:
    live = table(1)
    running(live, 0, 0.5, epoch=3, train_loss=1.25, validation_perplexity=5.5)
    live.progressed("t0", {"phase": "test", "fraction": 1.0, "epoch": 0, "train_loss": None})
    assert re.search(r"test +3 +1\.250 +5\.500", shown(live))


def test_running_trials_come_with_the_latest_ended_ones() -> None:
    live = table(30)
    for number in range(20):
        running(live, number, 1.0)
        live.ended(record(planned(number)))
    for number in range(20, 22):
        running(live, number, 0.5)
    assert trials_in(shown(live)) == [str(number) for number in range(10, 22)]


@pytest.mark.parametrize("at_once", [SHOWN_TRIALS - 1, SHOWN_TRIALS, SHOWN_TRIALS + 8])
def test_the_live_table_stays_within_its_rows(at_once: int) -> None:
    live = table(60)
    for number in range(30):
        running(live, number, 1.0)
        live.ended(record(planned(number)))
    for number in range(30, 30 + at_once):
        running(live, number, 0.5)
    assert len(trials_in(shown(live))) == SHOWN_TRIALS


def test_without_a_terminal_there_is_a_line_per_ended_trial() -> None:
    live = table(2, already=3, terminal=False)
    with live:
        live.opened(Path("runs/x"), 1)
        running(live, 0, 1.0)
        live.ended(record(planned(0), metrics={"test": {"perplexity": 4.25}}, wall_time_s=65.0))
        live.started("t1", "t1")
        live.ended(record(planned(1), status="failed", reason="ValueError: no", metrics={}))
    assert output(live.console).splitlines() == [
        "2 trials to run, 3 finished before; 1 at a time; run folder: runs/x",
        "[1/2] t0 LoRA r=0 specific seed 0: test perplexity 4.250 in 1 min 05 s; about 0.0 s left",
        "[2/2] t1 LoRA r=1 specific seed 0: failed: ValueError: no",
    ]


def test_without_a_terminal_progress_is_printed_only_while_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("harness.sweep.live.time.monotonic", lambda: now[0])
    live = table(4, terminal=False)
    with live:
        live.opened(Path("runs/x"), 2)
        running(live, 0, 0.2)
        now[0] += QUIET_S - 1
        running(live, 1, 0.5)
        live.ended(record(planned(1), metrics={"test": {"perplexity": 4.25}}, wall_time_s=3.0))
        now[0] += 2
        running(live, 0, 0.6)
        now[0] += QUIET_S
        running(live, 0, 0.8)
        running(live, 2, 0.2)
    lines = output(live.console).splitlines()
    assert lines[0] == "4 trials to run; 2 at a time; run folder: runs/x"
    assert lines[1].startswith("[1/4] t1 LoRA r=1 specific seed 0: test perplexity 4.250 in 3.0 s; about ")
    # 1.8 of 4 trials took 121 seconds.
    assert lines[2:] == ["[1/4] about 2 min 28 s left; running: LoRA r=0 specific seed 0: train 80%"]


def test_encoding_says_itself_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("harness.sweep.live.time.monotonic", lambda: now[0])
    live = table(1, terminal=False)
    with live:
        live.opened(Path("runs/x"), 1)
        now[0] += QUIET_S
        running(live, 0, 0.0, phase="encode image 40%, 12.0 s left")
    assert output(live.console).splitlines()[-1].endswith("seed 0: encode image 40%, 12.0 s left")


def test_the_learning_rate_is_named_where_trials_differ_only_in_it() -> None:
    same: dict[str, Any] = {"label": "LoRA"}
    trials = [planned(n, **same, learning_rate=rate) for n, rate in enumerate((0.006, 0.012))]
    trials.append(planned(2, label="none", learning_rate=0.01))
    assert list(trial_names(trials).values()) == [
        "LoRA specific learning rate 0.006 seed 0",
        "LoRA specific learning rate 0.012 seed 0",
        "none specific seed 0",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_square_brackets_in_a_reason_are_shown_as_they_are(terminal: bool) -> None:
    live = table(1, terminal=terminal)
    live.started("t0", "t0")
    reason = "KeyError: [image] and [/tmp/x]"
    live.ended(record(planned(0), status="failed", reason=reason, metrics={}))
    assert reason in (shown(live, width=140) if terminal else output(live.console))


def test_on_a_terminal_the_table_is_drawn_and_taken_away() -> None:
    live = table(1)
    with live:
        running(live, 0, 0.5)
        live._live.refresh()
        assert "0 of 1 trials" in output(live.console)
    assert output(live.console).endswith("\x1b[2K")


def test_a_trial_is_named_by_method_grouping_setting_and_seed() -> None:
    assert trial_name(planned(4, setting="examples=64")) == "LoRA r=4 specific examples=64 seed 0"
    assert trial_name(planned(4, label="none", grouping="")) == "none seed 0"
