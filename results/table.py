"""The leaderboard: a run's records → rows of (setting, label, grouping): means over seeds, differences, ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from harness.errors import UserError, did_you_mean
from harness.record import MetricInfo, Parameters, Plan, PlannedTrial, Run, TrialRecord
from results.matched import mismatch
from results.stats import Estimate, over_seeds, paired_difference, rank_ranges

SPLIT = "test"
RIGHT, WRONG = "perplexity", "perplexity_wrong_input"  # the wrong-input test compares these two


@dataclass(frozen=True)
class Row:
    """One method with one grouping in one setting, over its seeds. What was not measured is absent or None."""

    setting: str
    label: str
    method: str
    grouping: str
    trials: tuple[PlannedTrial, ...]
    finished: tuple[TrialRecord, ...]  # in the order of the plan
    is_reference: bool
    metrics: dict[str, Estimate]  # test split, by metric name
    input_use: Estimate | None  # perplexity with the wrong input / with the right one; 1 = the input is not used
    parameters: Parameters | None
    peak_bytes: Estimate | None  # growth from before the model was built to the highest point in training
    examples_per_s: Estimate | None
    tokens_per_s: Estimate | None
    wall_time_s: Estimate | None
    rank: tuple[int, int] | None = None  # first and last rank it may hold in its setting; None: not ranked
    differences: dict[str, Estimate] = field(default_factory=dict)  # from the reference, by metric name
    notes: tuple[str, ...] = ()  # why it is not ranked or has no difference, in words

    @property
    def name(self) -> str:
        """Label and grouping: ``LoRA r=4 specific``."""
        return f"{self.label} {self.grouping}".rstrip()

    @property
    def seeds(self) -> str:
        """Finished of planned seeds: ``2/2``."""
        return f"{len(self.finished)}/{len(self.trials)}"

    @property
    def incomplete(self) -> bool:
        """Whether a planned seed has not finished."""
        return len(self.finished) < len(self.trials)

    @property
    def rank_text(self) -> str:
        """``1``, ``2–4``, or empty where it is not ranked."""
        if self.rank is None:
            return ""
        first, last = self.rank
        return str(first) if first == last else f"{first}–{last}"

    def values(self, metric: str) -> dict[int, float]:
        """The metric on the test split by seed, of the seeds that have it."""
        return _by_seed(self.finished, metric)


@dataclass(frozen=True)
class Delta:
    """The step from one shared adapter group to one per context: specific - agnostic, paired by seed."""

    setting: str
    label: str
    agnostic: Row
    specific: Row
    differences: dict[str, Estimate]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Unfinished:
    """A planned trial without a result: why it failed, or None where it has not run."""

    trial: PlannedTrial
    status: str
    reason: str | None


@dataclass(frozen=True)
class Leaderboard:
    """All that the report shows in tables. Rows of a setting lie together, best mean of the primary metric first."""

    run: Run
    primary: MetricInfo
    rows: tuple[Row, ...]
    deltas: tuple[Delta, ...]
    failed: tuple[Unfinished, ...]
    missing: tuple[Unfinished, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings in the order of the plan."""
        return tuple(dict.fromkeys(trial.setting for trial in self.run.plan.trials))

    @property
    def reference_name(self) -> str:
        """What the others are compared with, as the plan labels it."""
        method = self.run.plan.reference_method
        return next((trial.label for trial in self.run.plan.trials if trial.method == method), method)

    def of(self, setting: str) -> list[Row]:
        """The rows of one setting."""
        return [row for row in self.rows if row.setting == setting]


def build_leaderboard(run: Run) -> Leaderboard:
    """Group the records of a run into rows, and compare the rows of each setting.

    Raises:
        UserError: the plan's primary metric is not among its metrics.
        ValueError: two trials of the plan are the same row and seed, so that one would hide the other.
    """
    plan = run.plan
    primary = _primary(plan)
    groups: dict[tuple[str, str, str], list[PlannedTrial]] = {}
    for trial in plan.trials:
        group = groups.setdefault((trial.setting, trial.label, trial.grouping), [])
        if any(other.seed == trial.seed for other in group):
            raise ValueError(f"plan.json: {trial.trial_id}: a trial with the same label, setting and seed exists")
        group.append(trial)
    by_setting: dict[str, list[Row]] = {}
    for (setting, _, _), trials in groups.items():
        by_setting.setdefault(setting, []).append(_row(trials, run))
    rows: list[Row] = []
    deltas: list[Delta] = []
    for setting_rows in by_setting.values():
        compared = _ranked(_against_reference(setting_rows, plan), primary)
        rows += sorted(compared, key=_best_first(primary))
        deltas += _deltas(compared, plan)
    failed, missing = _unfinished(run)
    return Leaderboard(run, primary, tuple(rows), tuple(deltas), failed, missing)


def leaderboard_rows(run: Run) -> tuple[Row, ...]:
    """The rows alone, for the terminal; raises as build_leaderboard does."""
    return build_leaderboard(run).rows


def _primary(plan: Plan) -> MetricInfo:
    for info in plan.metrics:
        if info.name == plan.primary_metric:
            return info
    hint = did_you_mean(plan.primary_metric, (info.name for info in plan.metrics))
    raise UserError(f"plan.json: primary_metric: {plan.primary_metric!r} is not a metric of this run; {hint}")


def _by_seed(records: Iterable[TrialRecord], metric: str) -> dict[int, float]:
    tested = ((record.seed, record.metrics.get(SPLIT, {})) for record in records)
    return {seed: metrics[metric] for seed, metrics in tested if metric in metrics}


def _row(trials: Sequence[PlannedTrial], run: Run) -> Row:
    found = [run.records[trial.trial_id] for trial in trials if trial.trial_id in run.records]
    finished = [record for record in found if record.status == "finished"]
    metrics = {info.name: over_seeds(list(_by_seed(finished, info.name).values())) for info in run.plan.metrics}
    right, wrong = _by_seed(finished, RIGHT), _by_seed(finished, WRONG)

    def mean(read: Callable[[TrialRecord], float | None]) -> Estimate | None:
        return over_seeds([value for value in map(read, finished) if value is not None])

    first = trials[0]
    return Row(
        setting=first.setting,
        label=first.label,
        method=first.method,
        grouping=first.grouping,
        trials=tuple(trials),
        finished=tuple(finished),
        is_reference=first.method == run.plan.reference_method,
        metrics={name: estimate for name, estimate in metrics.items() if estimate is not None},
        input_use=over_seeds([wrong[seed] / right[seed] for seed in right if seed in wrong]),
        parameters=next((record.parameters for record in finished if record.parameters), None),
        peak_bytes=mean(_peak_growth_bytes),
        examples_per_s=mean(lambda record: record.throughput.examples_per_s if record.throughput else None),
        tokens_per_s=mean(lambda record: record.throughput.tokens_per_s if record.throughput else None),
        wall_time_s=mean(lambda record: record.wall_time_s),
    )


def _peak_growth_bytes(record: TrialRecord) -> float | None:
    """A worker runs many trials: what it held before this one is not this one's."""
    memory = record.memory
    if memory is None or memory.process_peak_bytes is None or memory.process_before_bytes is None:
        return None
    return memory.process_peak_bytes - memory.process_before_bytes


def _paired(row: Row, other: Row, plan: Plan) -> tuple[dict[str, Estimate], tuple[str, ...]]:
    """Differences ``row - other`` over the seeds whose trials match, and a note for each seed left out."""
    partners = {record.seed: record for record in other.finished}
    matching: list[TrialRecord] = []
    notes = []
    for record in row.finished:
        partner = partners.get(record.seed)
        reason = f"{other.name} has not finished" if partner is None else mismatch(record, partner)
        if reason is None:
            matching.append(record)
        else:
            notes.append(f"seed {record.seed} not compared with {other.name}: {reason}")
    differences = {
        info.name: paired_difference(_by_seed(matching, info.name), other.values(info.name)) for info in plan.metrics
    }
    return {name: found for name, found in differences.items() if found is not None}, tuple(notes)


def _against_reference(rows: list[Row], plan: Plan) -> list[Row]:
    """Each row with its differences from the reference, the first row in the plan with the reference method."""
    reference = next((row for row in rows if row.is_reference), None)
    if reference is None:
        note = f"no {plan.reference_method!r} trial in this setting to compare with"
        return [replace(row, notes=(*row.notes, note)) for row in rows]
    compared = []
    for row in rows:
        if row is not reference:
            differences, notes = _paired(row, reference, plan)
            row = replace(row, differences=differences, notes=(*row.notes, *notes))  # noqa: PLW2901
        compared.append(row)
    return compared


def _ranked(rows: list[Row], primary: MetricInfo) -> list[Row]:
    """Rank the rows that were trained and scored on the same data.

    Each trial must match its seed's anchor: the reference's trial, or else the first finished one in the plan. Rows
    with a trial that does not match stay unranked, with the reason.
    """
    anchors: dict[int, tuple[str, TrialRecord]] = {}
    for row in sorted(rows, key=lambda row: not row.is_reference):
        for record in row.finished:
            anchors.setdefault(record.seed, (row.name, record))
    rankable: dict[int, Estimate] = {}
    noted = list(rows)
    for index, row in enumerate(rows):
        reasons = {}
        for record in row.finished:
            name, anchor = anchors[record.seed]
            if reason := mismatch(record, anchor):
                reasons[record.seed] = f"not ranked: seed {record.seed} does not match {name}: {reason}"
        if reasons:
            noted[index] = replace(row, notes=(*row.notes, *reasons.values()))
        elif primary.name in row.metrics:
            rankable[index] = row.metrics[primary.name]
    ranks = rank_ranges(list(rankable.values()), primary.higher_is_better)
    for index, rank in zip(rankable, ranks, strict=True):
        noted[index] = replace(noted[index], rank=rank)
    return noted


def _best_first(primary: MetricInfo) -> Callable[[Row], tuple[bool, bool, float]]:
    sign = -1 if primary.higher_is_better else 1

    def key(row: Row) -> tuple[bool, bool, float]:
        estimate = row.metrics.get(primary.name)
        return (estimate is None, row.rank is None, sign * estimate.mean if estimate else 0)

    return key


def _deltas(rows: list[Row], plan: Plan) -> list[Delta]:
    by_name = {(row.label, row.grouping): row for row in rows}
    deltas = []
    for row in rows:
        specific = by_name.get((row.label, "specific"))
        if row.grouping == "agnostic" and specific is not None:
            differences, notes = _paired(specific, row, plan)
            deltas.append(Delta(row.setting, row.label, row, specific, differences, notes))
    return deltas


def _unfinished(run: Run) -> tuple[tuple[Unfinished, ...], tuple[Unfinished, ...]]:
    failed, missing = [], []
    for trial in run.plan.trials:
        record = run.records.get(trial.trial_id)
        if record is None:
            missing.append(Unfinished(trial, "not run", None))
        elif record.status != "finished":
            failed.append(Unfinished(trial, record.status, record.reason))
    return tuple(failed), tuple(missing)
