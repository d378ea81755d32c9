"""Predicted against actual: what the report says of each row."""

from __future__ import annotations

from pathlib import Path

import harness
from harness.core.forecast import (
    FILE_NAME,
    Duration,
    Forecast,
    MemoryForecast,
    ShapeForecast,
    Totals,
    read_forecast,
    write_forecast,
)
from harness.core.record import Memory, Run
from results.leaderboard.format import ABSENT
from results.leaderboard.predicted import build_predicted
from results.report import write_report
from tests.support.profiled import ADAPTERS, trained

MIB = 1 << 20


def run_of(folder: Path) -> Run:
    return harness.load_results(folder).run


def forecast(run: Run, memory: MemoryForecast | None) -> Forecast:
    ids = tuple(trial.trial_id for trial in run.plan.trials)
    time = Duration(low_s=5, middle_s=10, high_s=20, source="probe")
    shape = ShapeForecast(key="k", name="full", setting="epochs=2", trial_ids=ids, memory=memory, trial=time)
    other = ShapeForecast(key="l", name="gone", setting="", trial_ids=("0" * 12,))
    return Forecast(device="cpu", shapes=(shape, other), totals=Totals(trials=2))


def test_each_row_has_both_and_their_ratio(tmp_path: Path) -> None:
    memory = Memory(weights_bytes=MIB, gradients_bytes=MIB, optimizer_bytes=2 * MIB, activations_bytes=6 * MIB)
    folder = trained(
        tmp_path,
        lambda record: record.model_copy(update={"memory": memory, "wall_time_s": 15.0}),
        adapters=ADAPTERS[2:],
    )
    assert build_predicted(run_of(folder)).lines == ()
    said = MemoryForecast(
        weights_bytes=MIB,
        gradients_bytes=MIB,
        optimizer_bytes=2 * MIB,
        activations_bytes=4 * MIB,
        working_bytes=9 * MIB,
    )
    run = run_of(folder)
    write_forecast(folder, forecast(run, said))
    assert read_forecast(folder) == forecast(run, said)
    (line,) = build_predicted(run).lines
    assert (line.memory, line.actual_memory, line.memory_ratio) == ("8.000", "10.00", "1.25×")
    assert (line.time, line.actual_time, line.time_ratio) == ("10.0 s (5.0 s to 20.0 s)", "15.0 s", "1.50×")
    assert (line.name, line.setting, line.source) == ("full", "epochs=2", "probed")


def test_what_was_not_predicted_is_absent_and_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = trained(tmp_path, adapters=ADAPTERS[2:])
    run = run_of(folder)
    write_forecast(folder, forecast(run, None))
    (line,) = build_predicted(run).lines
    assert (line.memory, line.memory_ratio) == (ABSENT, ABSENT)
    (folder / FILE_NAME).write_text("{}")
    found = build_predicted(run)
    assert found.lines == ()
    assert str(folder / FILE_NAME) in found.problems[0]


def test_the_page_has_a_section_where_there_is_a_forecast(tmp_path: Path) -> None:
    folder = trained(tmp_path, adapters=ADAPTERS[2:])
    assert "Predicted and actual" not in write_report([folder]).html.read_text(encoding="utf-8")
    write_forecast(folder, forecast(run_of(folder), None))
    assert "Predicted and actual" in write_report([folder]).html.read_text(encoding="utf-8")
