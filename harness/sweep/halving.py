"""Successive halving of the learning rates inside each row; knows nothing of Ray.

A trial that reaches a rung writes its checkpoint and ``paused.json``, and waits. When all trials of its row have
reached the rung or failed, the learning rates are ranked as the leaderboard ranks them, by validation perplexity alone,
and the decision is stored in ``halving.json``. It is never made again for the same trials and the same halving.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from harness.core.errors import UserError
from harness.core.files import write_atomically
from harness.core.record import PlannedTrial, Pruned, TrialRecord, paused_path, read_record, record_path, write_record
from harness.core.search import DECISIONS, AtRung, Decision, Decisions, Halving, ranked, read_decisions


@dataclass
class _Row:
    trials: list[PlannedTrial]
    halving: Halving
    decisions: list[Decision] = field(default_factory=list)  # for the first rungs

    @property
    def key(self) -> str:
        content = [sorted(trial.trial_id for trial in self.trials), self.halving.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        first = self.trials[0]
        return " ".join(filter(None, (first.label, first.grouping, first.setting)))

    @property
    def rates(self) -> list[float | None]:
        return list(dict.fromkeys(trial.learning_rate for trial in self.trials))

    @property
    def alive(self) -> list[float | None]:
        return [rate for rate in self.rates if all(decision.goes_on(rate) for decision in self.decisions)]


class HalvedRows:
    """The rows of a plan whose learning rates are halved, and what their trials have recorded.

    Args:
        run: the run folder.
        trials: of the plan.

    Raises:
        UserError: ``halving.json`` cannot be read.
    """

    def __init__(self, run: Path, trials: Iterable[PlannedTrial]) -> None:
        self.run = run
        try:
            stored = read_decisions(run)
        except ValueError as error:
            raise UserError(f"{error}; without the file, halving is decided anew from the trials' records") from None
        self._rows: dict[str, _Row] = {}  # by trial id
        self._trials: dict[str, PlannedTrial] = {}
        self._history: dict[str, tuple[float, ...]] = {}  # validation perplexities of a trial that has paused or ended
        self._ended: dict[str, bool] = {}  # by id of the trials that finished or failed: whether it finished
        groups: dict[tuple[str, str, str], list[PlannedTrial]] = {}
        for trial in trials:
            if trial.halving is not None:
                groups.setdefault((trial.label, trial.grouping, trial.setting), []).append(trial)
        for own in groups.values():
            assert own[0].halving is not None  # noqa: S101 - chosen above
            row = _Row(own, own[0].halving)
            if len(row.rates) > 1:
                row.decisions = [decision for decision in stored if decision.row == row.key]
                self._rows |= {trial.trial_id: row for trial in own}
                self._trials |= {trial.trial_id: trial for trial in own}

    def read(self) -> None:
        """Read what all trials have recorded, decide what follows, and write the records of those that are pruned."""
        for trial_id in self._rows:
            self._read(trial_id)
        for row in self._each():
            self._decide(row)
        if read_decisions(self.run) != self._decisions():  # those of other trials or of another halving are void
            self._store()
        for trial_id in self._rows:
            if self.is_out(trial_id) and paused_path(self.run, trial_id).exists():
                self.prune(trial_id)

    def rungs(self, trial_id: str) -> tuple[int, ...]:
        """The epochs after which a trial waits for the others of its row; none if its row has no search."""
        row = self._rows.get(trial_id)
        return row.halving.rungs if row else ()

    def is_out(self, trial_id: str) -> bool:
        """Whether the learning rate of a trial was pruned: none of its trials is run any more."""
        row = self._rows.get(trial_id)
        return row is not None and self._trials[trial_id].learning_rate not in row.alive

    def update(self, trial_id: str) -> None:
        """A trial has paused or ended: read what it recorded, and decide if its row is complete."""
        if trial_id in self._rows:
            self._read(trial_id)
            self._decide(self._rows[trial_id])

    def goes_on(self, trial_id: str, epoch: int) -> bool | None:
        """Whether a trial goes on from a rung; None: others of its row have not come so far."""
        row, rate = self._rows[trial_id], self._trials[trial_id].learning_rate
        index = row.halving.rungs.index(epoch)
        if index < len(row.decisions):
            return row.decisions[index].goes_on(rate)
        return True if row.alive == [rate] else None

    def prune(self, trial_id: str) -> None:
        """Write the record of a paused trial that does not go on; its checkpoint stays."""
        row, rate = self._rows[trial_id], self._trials[trial_id].learning_rate
        decision = next(one for one in row.decisions if not one.goes_on(rate))
        own = next(one for one in decision.candidates if one.learning_rate == rate)
        on = [one for one in decision.candidates if one.goes_on]
        seeds = sum(trial.learning_rate == rate for trial in row.trials)
        pruned = Pruned(
            epoch=decision.epoch,
            halving=row.halving,
            validation_perplexity=_mean(own) if len(own.validation_perplexity) == seeds else None,
            best_validation_perplexity=min((_mean(one) for one in on), default=None),
            candidates=len(decision.candidates),
            kept=len(on),
        )
        path = paused_path(self.run, trial_id)
        reason = _reason(pruned, rate)
        write_record(
            self.run, read_record(path).model_copy(update={"status": "pruned", "pruned": pruned, "reason": reason})
        )
        path.unlink()

    def _read(self, trial_id: str) -> None:
        record, paused = record_path(self.run, trial_id), paused_path(self.run, trial_id)
        path = next((path for path in (record, paused) if path.exists()), None)
        if path is None:
            return
        found: TrialRecord = read_record(path)
        self._history[trial_id] = tuple(epoch.validation_perplexity for epoch in found.history)
        if path is record and found.status != "pruned":  # by another halving: it may go on
            self._ended[trial_id] = found.status == "finished"

    def _decide(self, row: _Row) -> None:
        """Decide at the next rung as long as all that is needed has been recorded."""
        for index in range(len(row.decisions), len(row.halving.rungs)):
            alive = row.alive
            scores = [self._scores(row, rate, row.halving.rungs[index]) for rate in alive]
            if len(alive) < 2 or any(own is None for own in scores):
                return
            known = [own or {} for own in scores]
            on = ranked(known)[: row.halving.kept(len(row.rates), index + 1)]
            candidates = tuple(
                AtRung(learning_rate=rate, validation_perplexity=own, goes_on=place in on)
                for place, (rate, own) in enumerate(zip(alive, known, strict=True))
            )
            off = {one.learning_rate for one in candidates if not one.goes_on}
            row.decisions.append(
                Decision(
                    row=row.key,
                    name=row.name,
                    epoch=row.halving.rungs[index],
                    candidates=candidates,
                    out=tuple(trial.trial_id for trial in row.trials if trial.learning_rate in off),
                )
            )
            self._store()

    def _each(self) -> list[_Row]:
        return list({id(row): row for row in self._rows.values()}.values())

    def _decisions(self) -> tuple[Decision, ...]:
        return tuple(decision for row in self._each() for decision in row.decisions)

    def _store(self) -> None:
        content = Decisions(decisions=self._decisions()).model_dump_json(indent=1)
        write_atomically(self.run / DECISIONS, content + "\n")

    def _scores(self, row: _Row, rate: float | None, epoch: int) -> dict[int, float] | None:
        """Of a learning rate at a rung: seed → lowest validation perplexity; None if a trial has not come so far."""
        scores = {}
        for trial in row.trials:
            if trial.learning_rate != rate:
                continue
            history, ended = self._history.get(trial.trial_id, ()), self._ended.get(trial.trial_id)
            if len(history) >= epoch or (ended and history):  # it may have finished before, by patience
                scores[trial.seed] = min(history[:epoch])
            elif ended is None:
                return None
        return scores


def _mean(candidate: AtRung) -> float:
    return statistics.fmean(candidate.validation_perplexity.values())


def _reason(pruned: Pruned, rate: float | None) -> str:
    place = f"pruned at epoch {pruned.epoch}: {pruned.kept} of {pruned.candidates} learning rates go on"
    if pruned.validation_perplexity is None or pruned.best_validation_perplexity is None:
        return f"{place}, and a seed of {rate:g} failed" if rate is not None else f"{place}, and a seed failed"
    return (
        f"{place}; validation perplexity {pruned.validation_perplexity:.4g}, "
        f"of the best {pruned.best_validation_perplexity:.4g}"
    )
