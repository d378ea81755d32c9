"""Processes that log trials as workers do, at the same time: ``… mlflow_writer URI EXPERIMENT PARENT FOLDER COUNT``."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

from harness.core.record import PlannedTrial, write_record
from harness.tracking.grid import Grid
from harness.tracking.store import import_libraries
from harness.tracking.tracker import MlflowTracker
from tests.support.tracking import finished_record, four_trials

TRIALS, EPOCHS = 2, 20  # of each process


def planned_of(number: int) -> list[PlannedTrial]:
    """The trials of one process."""
    base = four_trials()[0][1]
    return [base.model_copy(update={"trial_id": f"{number:06d}{index:06d}"}) for index in range(TRIALS)]


def value_of(trial_id: str, epoch: int) -> float:
    """What a trial logs of an epoch."""
    return int(trial_id) + epoch / 1024


def write(grid: Grid, number: int) -> None:
    """Log the trials of one process, one after another."""
    spec = four_trials()[0][0]
    for planned in planned_of(number):
        home = grid.folder / "trials" / planned.trial_id
        tracker = MlflowTracker(grid, spec, planned, home)
        for epoch in range(1, EPOCHS + 1):
            value = value_of(planned.trial_id, epoch)
            tracker.metrics({"train_loss": value, "validation_perplexity": -value}, step=epoch)
        record = finished_record(planned, tracker.run_id, history=())
        write_record(grid.folder, record)
        tracker.finish(record, home)
        assert tracker.warnings == ()


if __name__ == "__main__":
    uri, experiment, parent, folder, count = sys.argv[1:]
    import_libraries(uri)
    grid, forked = Grid(uri, experiment, parent, Path(folder)), multiprocessing.get_context("fork")
    writers = [forked.Process(target=write, args=(grid, number)) for number in range(int(count))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    sys.exit(any(writer.exitcode for writer in writers))
