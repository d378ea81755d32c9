"""``leaderboard.json``: the leaderboard for programs. docs/leaderboard.md explains every field of the schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from harness.core.profile import Measured
from harness.core.record import Data, MetricScale, Parameters, Run
from harness.core.schema import read_strictly
from results.leaderboard.rows import Candidate
from results.leaderboard.table import Leaderboard, Row
from results.statistics.intervals import Difference, Estimate, Verdict


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedMetric(_Schema):
    """Name, label, direction and range of a metric, and the scale on which its scores are compared."""

    name: str
    label: str
    higher_is_better: bool
    scale: MetricScale
    lower: FiniteFloat | None
    upper: FiniteFloat | None


class PublishedEstimate(_Schema):
    """A mean over seeds with its 95 % interval."""

    mean: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    covers: str
    seeds: int
    seed_se: FiniteFloat | None
    example_se: FiniteFloat | None
    examples: int | None


class PublishedScore(PublishedEstimate):
    """A score on the test split."""

    by_seed: dict[int, FiniteFloat]


class PublishedDifference(PublishedEstimate):
    """A difference paired by seed and, where the interval covers them, by test example; a ratio on the log scale."""

    null: FiniteFloat
    p_value: FiniteFloat | None
    p_adjusted: FiniteFloat | None
    verdict: Verdict
    verdict_examples: Verdict | None
    more_seeds: int | None


class PublishedBadge(_Schema):
    """A doubt whether a row answers at all."""

    kind: str
    text: str
    doubts_answer: bool


class PublishedProfile(_Schema):
    """What was measured for the row's method apart from training."""

    device: str
    reference: str
    step_time_ratio: Measured | None
    step_time_s: Measured | None
    examples_per_s: Measured | None
    tokens_per_s: Measured | None
    memory_ratio: Measured | None
    peak_memory_bytes: Measured | None
    energy_ratio: Measured | None
    energy_j_per_step: Measured | None


class PublishedCandidate(_Schema):
    """A learning rate of a row's search."""

    learning_rate: FiniteFloat | None
    validation_perplexity: PublishedEstimate | None
    finished: int
    planned: int
    pruned_at_epoch: int | None


class PublishedRow(_Schema):
    """A method with a grouping in a setting, at its best learning rate."""

    setting: str
    label: str
    method: str
    grouping: str
    is_reference: bool
    rank: tuple[int, int] | None
    apart: tuple[str, ...]
    learning_rate: FiniteFloat | None
    effort: int
    halving: str
    candidates: tuple[PublishedCandidate, ...]
    seeds_finished: int
    seeds_planned: int
    trial_ids: dict[int, str]
    data: dict[int, Data]
    metrics: dict[str, PublishedScore]
    differences: dict[str, PublishedDifference]
    input_use: PublishedEstimate | None
    parameters: Parameters | None
    peak_bytes: PublishedEstimate | None
    examples_per_s: PublishedEstimate | None
    tokens_per_s: PublishedEstimate | None
    train_time_s: PublishedEstimate | None
    wall_time_s: PublishedEstimate | None
    profile: PublishedProfile | None
    badges: tuple[PublishedBadge, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Label and grouping: ``LoRA r=4 specific``."""
        return f"{self.label} {self.grouping}".rstrip()


class PublishedDelta(_Schema):
    """Specific minus agnostic of one label in one setting."""

    setting: str
    label: str
    differences: dict[str, PublishedDifference]
    notes: tuple[str, ...]


class PublishedUnfinished(_Schema):
    """A planned trial without a result."""

    trial_id: str
    status: str
    reason: str | None


class PublishedOrigin(_Schema):
    """What the leaderboard was made from."""

    experiments: tuple[str, ...]
    run_folders: tuple[str, ...]
    git_revisions: tuple[str, ...]
    versions: dict[str, tuple[str, ...]]


class PublishedLeaderboard(_Schema):
    """The whole file."""

    schema_version: Literal[3] = 3
    created_from: PublishedOrigin
    primary_metric: str
    metrics: tuple[PublishedMetric, ...]
    reference_method: str
    rows: tuple[PublishedRow, ...]
    deltas: tuple[PublishedDelta, ...]
    unfinished: tuple[PublishedUnfinished, ...]


def read_published(path: Path) -> PublishedLeaderboard:
    """Read a ``leaderboard.json``.

    Raises:
        OSError: the file could not be read.
        ValueError: it is not a leaderboard of this schema version; the message names the file and the key.
    """
    return read_strictly(PublishedLeaderboard, path, "a leaderboard.json of schema version 2")


def publish(board: Leaderboard) -> PublishedLeaderboard:
    """The content of the file; nothing in it depends on when or where it is written."""
    plan = board.run.plan
    return PublishedLeaderboard(
        created_from=_origin(board.run),
        primary_metric=plan.primary_metric,
        metrics=tuple(
            PublishedMetric.model_validate({name: getattr(info, name) for name in PublishedMetric.model_fields})
            for info in plan.metrics
        ),
        reference_method=plan.reference_method,
        rows=tuple(_row(row, board.run) for row in board.rows),
        deltas=tuple(
            PublishedDelta(
                setting=delta.setting,
                label=delta.label,
                differences=_differences(delta.differences),
                notes=delta.notes,
            )
            for delta in board.deltas
        ),
        unfinished=tuple(
            PublishedUnfinished(trial_id=one.trial.trial_id, status=one.status, reason=one.reason)
            for one in (*board.failed, *board.pruned, *board.missing)
        ),
    )


def _origin(run: Run) -> PublishedOrigin:
    records = run.records.values()
    versions: dict[str, set[str]] = {}
    for record in records:
        for package, version in record.versions.items():
            versions.setdefault(package, set()).add(version)
    folders = {run.folders.get(trial_id, run.folder) for trial_id in run.records}
    return PublishedOrigin(
        experiments=tuple(sorted({record.experiment for record in records})),
        run_folders=tuple(sorted({folder.resolve().name for folder in folders})),
        git_revisions=tuple(sorted({record.git_revision for record in records if record.git_revision})),
        versions={package: tuple(sorted(found)) for package, found in sorted(versions.items())},
    )


def _row(row: Row, run: Run) -> PublishedRow:
    scores = {
        name: PublishedScore.model_validate({**_fields(found), "by_seed": dict(sorted(row.values(name).items()))})
        for name, found in row.metrics.items()
    }
    finished = sorted(row.finished, key=lambda record: record.seed)
    return PublishedRow(
        setting=row.setting,
        label=row.label,
        method=row.method,
        grouping=row.grouping,
        is_reference=row.is_reference,
        rank=row.rank,
        apart=row.apart,
        learning_rate=row.chosen.learning_rate,
        effort=row.effort,
        halving=row.halving,
        candidates=tuple(map(_candidate, row.candidates)),
        seeds_finished=len(row.finished),
        seeds_planned=len(row.trials),
        trial_ids={record.seed: record.trial_id for record in finished},
        data={record.seed: record.data for record in finished if record.data is not None},
        metrics=scores,
        differences=_differences(row.differences),
        input_use=_estimate(row.input_use),
        parameters=row.parameters,
        peak_bytes=_estimate(row.peak_bytes),
        examples_per_s=_estimate(row.examples_per_s),
        tokens_per_s=_estimate(row.tokens_per_s),
        train_time_s=_estimate(row.train_time_s),
        wall_time_s=_estimate(row.wall_time_s),
        profile=_profile(row, run),
        badges=tuple(PublishedBadge.model_validate(vars(badge)) for badge in row.badges),
        notes=row.notes,
    )


def _fields(found: Estimate) -> dict[str, float | int | str | None]:
    return {
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "covers": found.covers,
        "seeds": found.n,
        "seed_se": found.seed_se,
        "example_se": found.example_se,
        "examples": found.examples,
    }


def _estimate(found: Estimate | None) -> PublishedEstimate | None:
    return None if found is None else PublishedEstimate.model_validate(_fields(found))


def _differences(found: Mapping[str, Difference]) -> dict[str, PublishedDifference]:
    own = ("null", "p_value", "p_adjusted", "verdict", "verdict_examples", "more_seeds")
    return {
        name: PublishedDifference.model_validate(_fields(one) | {field: getattr(one, field) for field in own})
        for name, one in found.items()
    }


def _profile(row: Row, run: Run) -> PublishedProfile | None:
    entry = run.profile.entry_of(row.trials[0].trial_id) if run.profile else None
    if entry is None:
        return None
    return PublishedProfile.model_validate({name: getattr(entry, name) for name in PublishedProfile.model_fields})


def _candidate(candidate: Candidate) -> PublishedCandidate:
    return PublishedCandidate(
        learning_rate=candidate.learning_rate,
        validation_perplexity=_estimate(candidate.validation),
        finished=len(candidate.finished),
        planned=len(candidate.trials),
        pruned_at_epoch=candidate.pruned_at,
    )
