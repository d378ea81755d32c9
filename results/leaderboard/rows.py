"""One row of the leaderboard: a method with a grouping in a setting, over its seeds, at its best learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from harness.core.formulas import Floats
from harness.core.record import Parameters, PlannedTrial, Run, TrialRecord
from harness.core.search import ranked
from results.leaderboard.badges import Badge
from results.leaderboard.code import mixed_versions
from results.leaderboard.format import rank_text
from results.statistics.intervals import Difference, Estimate, estimate_positive
from results.statistics.resample import score_on_test

RIGHT, WRONG = "perplexity", "perplexity_wrong_input"  # the wrong-input test compares these two
VALIDATION = "perplexity"  # on the validation split: the criterion by which a learning rate is chosen


@dataclass(frozen=True)
class Candidate:
    """One learning rate of a search."""

    learning_rate: float | None
    trials: tuple[PlannedTrial, ...]
    finished: tuple[TrialRecord, ...]
    ended: int  # trials with a record, failed and pruned ones too
    validation: Estimate | None  # perplexity
    pruned_at: int | None = None  # the epoch after which halving pruned it

    @property
    def validation_by_seed(self) -> dict[int, float]:
        """Validation perplexity of the finished seeds."""
        scores = ((record.seed, record.metrics.get("validation", {}).get(VALIDATION)) for record in self.finished)
        return {seed: score for seed, score in scores if score is not None}


@dataclass(frozen=True)
class Search:
    """The learning rates of one row, in the order of the plan, and the chosen one."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate


@dataclass(frozen=True)
class Row:
    """One method with one grouping in one setting, over its seeds. Unmeasured values are absent or None."""

    setting: str
    label: str
    method: str
    grouping: str
    candidates: tuple[Candidate, ...]  # every learning rate, in the order of the plan
    chosen: Candidate  # the one that validated best; everything below is measured with it
    effort: int  # learning rates it was chosen from, including those tried before
    halving: str  # how they were halved: "halving at epoch 1 by 2"; empty if they were not
    is_reference: bool
    metrics: dict[str, Estimate]  # test split, by metric name; a perplexity's mean over seeds is geometric
    input_use: Estimate | None  # perplexity with the wrong input / with the right one; 1 = the input is not used
    parameters: Parameters | None
    peak_bytes: Estimate | None  # growth of memory from before the model was built to the peak in training
    examples_per_s: Estimate | None
    tokens_per_s: Estimate | None
    train_time_s: Estimate | None
    wall_time_s: Estimate | None
    rank: tuple[int, int] | None = None  # best and worst possible rank in its setting; None: not ranked
    differences: dict[str, Difference] = field(default_factory=dict)  # from the reference, by metric name
    # Errors of the primary difference on resampled test examples (B,), on the metric's scale (results/statistics/
    # scales.py); the same resamples in every setting.
    difference_errors_B: Floats | None = field(default=None, repr=False, compare=False)
    apart: tuple[str, ...] = ()  # why it is excluded from ranking; empty if it is ranked
    notes: tuple[str, ...] = ()  # why a difference is missing, and what is unresolved about the learning rate
    mixed_versions: str | None = None  # with what its trials were made, where not all of the table were
    badges: tuple[Badge, ...] = ()  # whether it answers at all: one text for all, ignores its input, at chance

    @property
    def name(self) -> str:
        """Label and grouping: ``LoRA r=4 specific``."""
        return f"{self.label} {self.grouping}".rstrip()

    @property
    def trials(self) -> tuple[PlannedTrial, ...]:
        """The planned trials of the chosen learning rate."""
        return self.chosen.trials

    @property
    def finished(self) -> tuple[TrialRecord, ...]:
        """The finished trials of the chosen learning rate, in the order of the plan."""
        return self.chosen.finished

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
        """``1``, ``2–4``, or empty if it is not ranked."""
        return rank_text(self.rank)

    def values(self, metric: str) -> dict[int, float]:
        """The metric on the test split by seed, for the seeds that have it."""
        return by_seed(self.finished, metric)


def by_seed(records: Iterable[TrialRecord], metric: str) -> dict[int, float]:
    """A score on the test split by seed, for the records that have it."""
    found: dict[int, float] = {}
    for record in records:  # a plain loop: it is run for every row and metric, many times
        score = score_on_test(record, metric)
        if score is not None:
            found[record.seed] = score
    return found


def candidates_of(trials: Sequence[PlannedTrial], run: Run) -> tuple[Candidate, ...]:
    """The learning rates of one row's trials."""
    by_rate: dict[float | None, list[PlannedTrial]] = {}
    for trial in trials:
        by_rate.setdefault(trial.learning_rate, []).append(trial)
    found = []
    for rate, planned in by_rate.items():
        records = [run.records[trial.trial_id] for trial in planned if trial.trial_id in run.records]
        # What another halving had pruned goes on when the experiment is run again.
        records = [record for record in records if record.status != "pruned" or record.trial_id in run.out]
        pruned = next((record.pruned.epoch for record in records if record.pruned is not None), None)
        finished = tuple(record for record in records if record.status == "finished")
        bare = Candidate(rate, tuple(planned), finished, len(records), None, pruned)
        found.append(replace(bare, validation=estimate_positive(list(bare.validation_by_seed.values()))))
    return tuple(found)


def search_of(trials: Sequence[PlannedTrial], run: Run) -> Search:
    """The learning rates of one row's trials, and the best of them."""
    candidates = candidates_of(trials, run)
    return Search(candidates, choose(candidates))


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the lowest mean validation perplexity among those that finished the most seeds.

    See ``harness.core.search.ranked``. Without any validation score it is the first in the plan.
    """
    order = ranked([candidate.validation_by_seed for candidate in candidates])
    return candidates[order[0] if order else 0]


def search_effort(candidates: Sequence[Candidate]) -> int:
    """How many learning rates were tried, including those that the experiment declares as tried before.

    A rate counts as tried when all its planned trials have ended (failed ones too), or as many as those of the rate
    that is furthest: while a grid runs, seeds that no rate has reached yet do not reduce the effort.
    """
    furthest = max(candidate.ended for candidate in candidates)
    tried = {one.learning_rate for one in candidates if one.ended and one.ended in (len(one.trials), furthest)}
    before = {rate for one in candidates for trial in one.trials for rate in trial.tried_learning_rates}
    return len(tried | before)


def halving_of(candidates: Sequence[Candidate]) -> str:
    """How the learning rates of a row were halved; empty if each was trained to the end.

    What was planned counts, and that no more rates were trained to the end than halving keeps: a row of which more
    were has had another search, such as one without halving before.
    """
    plans = dict.fromkeys(trial.halving for one in candidates for trial in one.trials)
    if len(candidates) == 1 or list(plans) == [None]:
        return ""
    text = " and ".join(halving.text if halving is not None else "no halving" for halving in plans)
    trained = sum(bool(one.finished) for one in candidates)
    kept = max(halving.kept(len(candidates)) if halving is not None else len(candidates) for halving in plans)
    return f"{text}, but {trained} learning rates trained to the end" if trained > kept else text


def unended(candidates: Sequence[Candidate]) -> str:
    """``2 of 3 learning rates have not ended``; empty if all have, or if there is no search."""
    count = sum(one.ended < len(one.trials) for one in candidates)
    if len(candidates) == 1 or not count:
        return ""
    return f"{count} of {len(candidates)} learning rates {'has' if count == 1 else 'have'} not ended"


def _search_notes(candidates: Sequence[Candidate], chosen: Candidate) -> tuple[str, ...]:
    """What is unresolved about the choice of the learning rate."""
    open_ = unended(candidates)
    notes = [f"{open_}: another one may still be chosen"] if open_ else []
    for one in candidates:
        if (
            one.pruned_at is None
            and one.ended == len(one.trials)
            and len(one.validation_by_seed) < len(chosen.validation_by_seed)
        ):
            failed = f"{len(one.trials) - len(one.finished)} of {len(one.trials)} trials failed"
            notes.append(f"learning rate {one.learning_rate} was excluded from selection: {failed}")
    return tuple(notes)


def _stopped(finished: Sequence[TrialRecord]) -> tuple[str, ...]:
    """``stopped by patience=2 after 5 to 7 of 8 epochs``; nothing without patience, or if all epochs were trained."""
    budget = finished[0].spec.get("budget", {}) if finished else {}
    epochs = sorted(len(record.history) for record in finished)
    if budget.get("patience") is None or epochs[0] == budget["epochs"]:
        return ()
    after = f"{epochs[0]}" if epochs[0] == epochs[-1] else f"{epochs[0]} to {epochs[-1]}"
    return (f"stopped by patience={budget['patience']} after {after} of {budget['epochs']} epochs",)


def make_row(search: Search, reference_method: str) -> Row:
    """The row of trials that differ only in seed and learning rate; not scored and compared yet."""
    candidates, chosen = search.candidates, search.chosen
    finished = chosen.finished

    def mean(read: Callable[[TrialRecord], float | None]) -> Estimate | None:
        return estimate_positive([value for value in map(read, finished) if value is not None])

    first, mixed = candidates[0].trials[0], mixed_versions(finished)
    return Row(
        setting=first.setting,
        label=first.label,
        method=first.method,
        grouping=first.grouping,
        candidates=candidates,
        chosen=chosen,
        effort=search_effort(candidates),
        halving=halving_of(candidates),
        is_reference=first.method == reference_method,
        metrics={},
        input_use=None,
        parameters=next((record.parameters for record in finished if record.parameters), None),
        peak_bytes=mean(_peak_growth_bytes),
        examples_per_s=mean(lambda record: record.throughput.examples_per_s if record.throughput else None),
        tokens_per_s=mean(lambda record: record.throughput.tokens_per_s if record.throughput else None),
        train_time_s=mean(lambda record: record.phases_s.get("train")),
        wall_time_s=mean(lambda record: record.wall_time_s),
        notes=(*_search_notes(candidates, chosen), *_stopped(finished), *([mixed] if mixed else [])),
        mixed_versions=mixed,
    )


def _peak_growth_bytes(record: TrialRecord) -> float | None:
    """Peak minus initial memory: a worker runs many trials, and what it held before does not belong to this one."""
    memory = record.memory
    if memory is None or memory.process_peak_bytes is None or memory.process_before_bytes is None:
        return None
    return memory.process_peak_bytes - memory.process_before_bytes
