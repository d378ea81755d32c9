"""The results of run folders as a Python object: DataFrames, the leaderboard, a LaTeX table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.core.errors import UserError
from harness.core.record import Run
from harness.core.storage import local_folder
from results.leaderboard.join import read_runs

if TYPE_CHECKING:
    import pandas as pd

    from results.leaderboard.recommend import Recommendation
    from results.leaderboard.table import Leaderboard


@dataclass(frozen=True)
class Results:
    """The results of one run folder, or of several as one leaderboard. Everything is read on first use.

    Attributes:
        folders: the run folders.
        report: the HTML report; None if it has not been written.
        tracking_problem: why the end of a run could not be logged to MLflow; None if it was.
        tracking_link: path of the table of trials on MLflow's page, below its address; None if nothing was run.
        stopped: what ended the run early: SIGTERM (``signal``), ``harness stop`` (``request``),
            ``budget.gpu_hours`` (``budget``) or Ctrl-C
            (``interrupt``); None: nothing did.
        settled: whether all was there already: nothing was computed, and the report is as it was.
        selected: ids of the trials that the run was asked for (``only``); None: all.
    """

    folders: tuple[Path, ...]
    report: Path | None = None
    tracking_problem: str | None = None
    tracking_link: str | None = None
    stopped: Literal["signal", "request", "interrupt", "budget"] | None = None
    settled: bool = False
    selected: frozenset[str] | None = None
    known_board: Leaderboard | None = field(default=None, repr=False, compare=False)  # if it has been made already

    @property
    def folder(self) -> Path:
        """The run folder.

        Raises:
            UserError: there are several.
        """
        if len(self.folders) > 1:
            raise UserError(f"these are the results of {len(self.folders)} run folders; use Results.folders")
        return self.folders[0]

    @property
    def complete(self) -> bool:
        """Whether all planned trials, or those selected, have finished, except those that halving has pruned."""
        if self.settled:
            return True
        ended = {trial_id for trial_id, record in self.run.records.items() if record.status == "finished"}
        planned = {trial.trial_id for trial in self.run.plan.trials}
        return (planned if self.selected is None else self.selected) <= ended | self.run.out

    @cached_property
    def run(self) -> Run:
        """The plan and the records."""
        return self.known_board.run if self.known_board else read_runs(self.folders)

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row for each trial that has ended: names, options, status, all scores, parameters, memory, speed.

        The columns are those of ``trials.parquet``; docs/leaderboard.md explains them.
        """
        from results.export.trials import trials_frame

        return trials_frame(self.run)

    @cached_property
    def leaderboard(self) -> pd.DataFrame:
        """One row for each method and setting, with means, intervals and ranks; the columns of ``leaderboard.csv``."""
        import pandas as pd

        from results.export.text import table_rows

        return pd.DataFrame(table_rows(self.board))

    @cached_property
    def profile(self) -> pd.DataFrame:
        """One row for each method: step time, speed, memory, energy, measured apart from training, with intervals.

        Ratios are to the method in the column ``reference``. Empty if nothing was profiled; see docs/profile.md.
        """
        import pandas as pd

        from results.leaderboard.profiled import profile_rows

        return pd.DataFrame(profile_rows(self.run.profile))

    @cached_property
    def board(self) -> Leaderboard:
        """The leaderboard as Python objects."""
        from results.leaderboard.table import build_leaderboard

        return self.known_board or build_leaderboard(self.run)

    def recommend(
        self,
        *,
        max_trainable: str | float | None = None,
        max_memory: str | float | None = None,
        max_hours: str | float | None = None,
        within: str | float | None = None,
        metric: str | None = None,
    ) -> tuple[Recommendation, ...]:
        """Which method to use: the cheapest that is not worse than the best, as ``harness recommend`` says it.

        Args:
            max_trainable: most trainable parameters: ``2_000_000``, ``"2M"``, or ``"1%"`` of the reference method's.
            max_memory: most memory in training: ``"24GiB"``, bytes, or a share.
            max_hours: longest training of one trial, or a share.
            within: how much worse than the best is good enough: ``"2%"``; default: the experiment's margin.
            metric: decide by this metric; default: the primary one.

        Returns:
            One for each setting; with several settings the first is the one over all of them.

        Raises:
            UserError: an amount cannot be read, the metric is unknown, or a share has no reference method.
        """
        from results.leaderboard.amounts import parse_margin
        from results.leaderboard.recommend import limits_of, recommend_from

        limits = limits_of(max_trainable, max_memory, max_hours)
        margin = None if within is None else parse_margin(within, "within")
        return recommend_from(self.run, limits, margin, metric)


def load_results(runs: str | Path | Iterable[str | Path]) -> Results:
    """The results of a run folder, or of several as one leaderboard; also while a run is in progress.

    ``harness.load_results("runs/quickstart").trials`` is a DataFrame with one row for each trial.

    Args:
        runs: a run folder, which is what ``harness run`` writes, or its URL (``s3://…``), or several.

    Raises:
        UserError: a folder is missing, is given twice or holds no run; a plan is invalid; or the runs have different
            primary metrics or reference methods.
    """
    folders = tuple(map(local_folder, [runs] if isinstance(runs, str | Path) else runs))
    results = Results(folders, _written_report(folders))
    _ = results.run  # folders that hold no run are found here, not at the first use
    return results


def _written_report(folders: tuple[Path, ...]) -> Path | None:
    path = folders[0] / "report" / "index.html" if len(folders) == 1 else None
    return path if path and path.exists() else None
