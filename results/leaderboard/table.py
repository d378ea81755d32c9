"""The leaderboard: a run's records → rows by (setting, label, grouping): means over seeds, differences, ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath

from threadpoolctl import threadpool_limits

from harness.core.errors import UserError, did_you_mean
from harness.core.formulas import Floats
from harness.core.record import MetricInfo, Plan, PlannedTrial, Run
from results.leaderboard.code import other_code
from results.leaderboard.families import Families, families_of
from results.leaderboard.matched import Pairs, exclude_unmatched, pairs
from results.leaderboard.rows import RIGHT, WRONG, Row, make_row, search_of
from results.statistics.intervals import Difference, rank_ranges
from results.statistics.resample import Resampled, examples_of
from results.statistics.scales import scale_of

__all__ = ["RIGHT", "WRONG", "Delta", "Leaderboard", "Row", "Unfinished", "build_leaderboard"]


@dataclass(frozen=True)
class Delta:
    """The step from one shared adapter group to one per context: specific - agnostic, paired by seed and example."""

    setting: str
    label: str
    agnostic: Row
    specific: Row
    differences: dict[str, Difference]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Unfinished:
    """A planned trial without a result; ``reason``: why it failed or could not be read, None if it has not run."""

    trial: PlannedTrial
    status: str
    reason: str | None


@dataclass(frozen=True)
class Leaderboard:
    """What the report shows in tables. Rows are grouped by setting, best mean of the primary metric first."""

    run: Run
    primary: MetricInfo
    rows: tuple[Row, ...]
    deltas: tuple[Delta, ...]
    failed: tuple[Unfinished, ...]
    missing: tuple[Unfinished, ...]
    pruned: tuple[Unfinished, ...] = ()  # by halving; those that another halving had pruned are missing
    # Per-example files that could not be read: the intervals of their rows cover only seeds.
    unreadable: tuple[str, ...] = ()
    families: Mapping[str, Families] = field(default_factory=dict, repr=False, compare=False)  # by setting

    def compare(self, one: Row, other: Row, metric: str | None = None) -> Difference | None:
        """``one`` less ``other``, two ranked rows of one setting, corrected over all pairs of its ranked rows.

        Args:
            one: a row.
            other: another row of its setting.
            metric: None for the primary one.

        Returns:
            None if a row is not ranked or lacks the score, or if they share no seed.
        """
        families = self.families.get(one.setting)
        if families is None or one.setting != other.setting:
            return None
        return families.difference(one, other, metric or self.primary.name)

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings in the order of the plan."""
        return tuple(dict.fromkeys(trial.setting for trial in self.run.plan.trials))

    @property
    def ranking_metrics(self) -> list[MetricInfo]:
        """The metrics of the tables, the primary one first; the wrong-input perplexity has its own section."""
        others = [info for info in self.run.plan.metrics if info is not self.primary and info.name != WRONG]
        return [self.primary, *others]

    @property
    def reference_name(self) -> str:
        """The label of the reference method."""
        method = self.run.plan.reference_method
        return next((trial.label for trial in self.run.plan.trials if trial.method == method), method)

    def of(self, setting: str) -> list[Row]:
        """The ranked rows of one setting, best first; rows excluded from ranking are left out."""
        return [row for row in self.rows if row.setting == setting and not row.apart]

    def apart(self, setting: str) -> list[Row]:
        """The rows of one setting that are excluded from ranking."""
        return [row for row in self.rows if row.setting == setting and row.apart]


def build_leaderboard(run: Run) -> Leaderboard:
    """Group the records of a run into rows, and compare the rows of each setting.

    Raises:
        UserError: the plan's primary metric is not among its metrics.
        ValueError: two trials of the plan share row, learning rate and seed, so one would hide the other.
    """
    plan = run.plan
    primary = _primary(plan)
    settings: dict[str, dict[tuple[str, str], list[PlannedTrial]]] = {}
    for trial in plan.trials:
        group = settings.setdefault(trial.setting, {}).setdefault((trial.label, trial.grouping), [])
        if any((other.seed, other.learning_rate) == (trial.seed, trial.learning_rate) for other in group):
            raise ValueError(f"plan.json: {trial.trial_id}: a trial with the same label, setting and seed exists")
        group.append(trial)
    rows: list[Row] = []
    deltas: list[Delta] = []
    unreadable: list[str] = []
    families: dict[str, Families] = {}
    searches = [[search_of(trials, run) for trials in groups.values()] for groups in settings.values()]
    records = [[record for search in setting for record in search.chosen.finished] for setting in searches]
    examples = examples_of(run, list(itertools.chain(*records)), plan.metrics)
    # One thread: the matrix products are small, and several threads would wait longer than they compute.
    with threadpool_limits(1, user_api="blas"):
        for setting, finished in zip(searches, records, strict=True):
            resampled = Resampled(finished, plan.metrics, itertools.islice(examples, len(finished)))
            made = [make_row(search, plan.reference_method) for search in setting]
            found, steps, compared = _compared(made, plan, primary, resampled)
            rows += sorted(found, key=_best_first(primary))
            deltas += steps
            families[made[0].setting] = compared
            unreadable += resampled.unreadable
    failed, missing, pruned = _unfinished(run)
    return Leaderboard(run, primary, tuple(rows), tuple(deltas), failed, missing, pruned, tuple(unreadable), families)


def _primary(plan: Plan) -> MetricInfo:
    for info in plan.metrics:
        if info.name == plan.primary_metric:
            return info
    hint = did_you_mean(plan.primary_metric, (info.name for info in plan.metrics))
    raise UserError(f"plan.json: primary_metric: {plan.primary_metric!r} is not a metric of this run; {hint}")


def _compared(
    rows: list[Row], plan: Plan, primary: MetricInfo, resampled: Resampled
) -> tuple[list[Row], list[Delta], Families]:
    """The rows of one setting, ranked and compared with the reference, the steps from agnostic to specific, and the
    families of its comparable rows."""
    marked = _with_code(exclude_unmatched(rows))
    margin = plan.equivalence_margin
    families, able = families_of([row for row in marked if not row.apart], plan.metrics, margin, resampled)
    measured = {row.name: row for row in able}
    for row in marked:
        if row.apart:
            measured[row.name] = families_of([row], plan.metrics, margin, resampled)[1][0]
    ranked = _ranked([measured[row.name] for row in marked], primary, families)
    found = _against_reference(ranked, plan, primary, families, resampled)
    return found, _deltas(found, plan, families, resampled), families


def _with_code(rows: Sequence[Row]) -> list[Row]:
    """The rows, marked where their trials were made with other code than most of the table."""
    found = other_code([row.finished for row in rows])
    return [
        replace(row, mixed_versions=text, notes=(*row.notes, text)) if text and not row.mixed_versions else row
        for row, text in zip(rows, found, strict=True)
    ]


def _ranked(rows: list[Row], primary: MetricInfo, families: Families) -> list[Row]:
    """Rank the comparable rows that have the primary score."""
    if primary.name not in families.of:
        return rows
    ranges = rank_ranges(families.of[primary.name].order())
    places = families.places[primary.name]
    return [row if row.name not in places else replace(row, rank=ranges[places[row.name]]) for row in rows]


def _against_reference(
    rows: list[Row], plan: Plan, primary: MetricInfo, families: Families, resampled: Resampled
) -> list[Row]:
    """Each row with its differences from the reference, the first row in the plan with the reference method."""
    reference = next((row for row in rows if row.is_reference), None)
    if reference is None:
        note = f"no {plan.reference_method!r} trial in this setting to compare with"
        return [replace(row, notes=(*row.notes, note)) for row in rows]
    found = []
    for row in rows:
        own, notes = _with_reference(row, reference)
        found.append(
            replace(
                row,
                differences=_differences(row, reference, plan.metrics, families) if own else {},
                difference_errors_B=_errors(own, primary, resampled),
                notes=(*row.notes, *notes),
            )
        )
    return found


def _differences(one: Row, other: Row, metrics: Sequence[MetricInfo], families: Families) -> dict[str, Difference]:
    both = ((info.name, families.difference(one, other, info.name)) for info in metrics)
    return {name: found for name, found in both if found is not None}


def _with_reference(row: Row, reference: Row) -> tuple[Pairs, tuple[str, ...]]:
    """The pairs of a row with the reference; none if one is excluded from ranking, which has its own reason."""
    if row is reference or row.apart:
        return [], ()
    if reference.apart:
        return [], (f"not compared with {reference.name}, which is excluded from ranking",)
    return pairs(row, reference)


def _errors(own: Pairs, primary: MetricInfo, resampled: Resampled) -> Floats | None:
    one = resampled.replicates([pair[0] for pair in own], primary.name)
    other = resampled.replicates([pair[1] for pair in own], primary.name)
    if one is None or other is None:
        return None
    scale = scale_of(primary, one[1])
    difference_B = scale.forward(one[0]) - scale.forward(other[0])
    errors_B: Floats = difference_B - difference_B.mean()
    return errors_B


def _best_first(primary: MetricInfo) -> Callable[[Row], tuple[bool, bool, float]]:
    sign = -1 if primary.higher_is_better else 1

    def key(row: Row) -> tuple[bool, bool, float]:
        found = row.metrics.get(primary.name)
        return (found is None, row.rank is None, sign * found.mean if found else 0)

    return key


def _deltas(rows: list[Row], plan: Plan, families: Families, resampled: Resampled) -> list[Delta]:
    by_name = {(row.label, row.grouping): row for row in rows}
    steps = [
        (row, by_name[(row.label, "specific")])
        for row in rows
        if row.grouping == "agnostic" and (row.label, "specific") in by_name
    ]
    found = []
    for agnostic, specific in steps:
        own, notes = pairs(specific, agnostic)
        # Two rows that are excluded from ranking may match one another.
        both = families
        if own and (agnostic.apart or specific.apart):
            both = families_of([specific, agnostic], plan.metrics, plan.equivalence_margin, resampled)[0]
        differences = _differences(specific, agnostic, plan.metrics, both) if own else {}
        found.append(Delta(agnostic.setting, agnostic.label, agnostic, specific, differences, notes))
    return found


def _unfinished(run: Run) -> tuple[tuple[Unfinished, ...], tuple[Unfinished, ...], tuple[Unfinished, ...]]:
    failed: list[Unfinished] = []
    missing: list[Unfinished] = []
    pruned: list[Unfinished] = []
    broken = {PurePath(message.partition(": ")[0]).parent.name: message for message in run.broken}
    for trial in run.plan.trials:
        record = run.records.get(trial.trial_id)
        if record is None and trial.trial_id in broken:
            failed.append(Unfinished(trial, "unreadable", broken[trial.trial_id]))
        elif record is None:
            missing.append(Unfinished(trial, "not run", None))
        elif record.status == "pruned":
            found = pruned if trial.trial_id in run.out else missing
            found.append(Unfinished(trial, "pruned", record.reason))
        elif record.status != "finished":
            failed.append(Unfinished(trial, record.status, record.reason))
    return tuple(failed), tuple(missing), tuple(pruned)
