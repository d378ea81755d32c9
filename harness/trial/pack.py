"""Several trials in one process, which take their training steps together where that is faster.

The trials differ at most in their adapters and learning rates, so they see the same examples in the same order. Each
has all that it has alone: engine, schedule, clipping, best epoch, checkpoint, log, record. What they have together is
the data, the frozen language model, and the pass of a training step: one for the rows of all. A trial that ends, in
whatever way, is no longer part of it; one that is behind the others after a restart first catches up.

Dropout of projectors and adapters is drawn as by each trial alone. That of a language model cannot be, so its trials
take their steps alone.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from harness.core.exhaustion import is_out_of_memory
from harness.core.record import Packed, TrialRecord
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.batch import Batch
from harness.model.budget import Draw
from harness.model.build import Common, common_of
from harness.model.joint import JointModel
from harness.model.kept import Kept
from harness.model.on_disk import disk_of
from harness.model.shared_prefix import agrees
from harness.tracking.tracker import Tracker
from harness.trial.attempt import steps_to_record
from harness.trial.engine import check_finite
from harness.trial.log import LOG, log_to
from harness.trial.measure import WARMUP_STEPS, wait_for
from harness.trial.randomness import random_states, set_random_states
from harness.trial.steps import Steps, Taken
from harness.trial.trial import Report, Stop, Trial, never

MEASURED_STEPS = 4  # together, before it is decided whether that is faster; the first one is not counted
_FASTER = 0.95  # of the time of the steps alone: steps together take at most so much
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass
class Member(Generic[T]):
    """A trial of a pack.

    Attributes:
        trial: the trial.
        steps: its steps, until its record.
        draws: what it waits to train on; None: it has ended, or not begun.
        result: what it ended with.
        error: the error that left it without.
        random: states of the random generators, as the trial alone would have left them; empty: it has not begun.
    """

    trial: Trial
    steps: Steps[T]
    draws: list[Draw] | None = None
    result: T | None = None
    error: Exception | None = None
    random: list[Tensor] = field(default_factory=list)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While the trial computes, the random generators are its own."""
        before = random_states()
        set_random_states(self.random or before)
        try:
            yield
        finally:
            self.random = random_states()
            set_random_states(before)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """While the trial runs, the log and the random generators are its own."""
        with self.drawing(), log_to(self.trial.folder / LOG):
            yield

    def go_on(self, taken: Taken | Exception | None = None) -> None:
        """Run the trial until its next training step, or to its end.

        Args:
            taken: what came of the last step; None: it has not begun.
        """
        self.draws = None
        with self.in_turn():
            try:
                if isinstance(taken, Exception):
                    self.draws = self.steps.throw(taken)
                else:
                    self.draws = next(self.steps) if taken is None else self.steps.send(taken)
            except StopIteration as end:
                self.result = end.value
            except Exception as error:  # its record could not be written; the others go on
                self.error = error

    def take(self, batch: Batch, measured: bool) -> Taken | Exception:
        """Take a training step alone; returns the error if there is one.

        Args:
            batch: to train on.
            measured: whether its duration is compared with others: then the device ends it first.
        """
        started = time.monotonic()
        with self.in_turn():
            try:
                with self.trial.training_on(self.draws or ()):
                    loss = self.trial.step_on(batch)
                if measured:
                    wait_for(self.trial.device)
            except Exception as error:  # the trial's, which handles it
                return error
        return Taken(loss, time.monotonic() - started)


@dataclass(frozen=True)
class Wanted:
    """A trial that is to be run in a pack.

    Attributes:
        spec: of the trial.
        tracker: receives its metrics and its record.
        report: called with its progress.
        rungs: epochs after which it pauses.
        ended: called when its record is written.
    """

    spec: TrialSpec
    tracker: Tracker
    report: Report
    rungs: Collection[int] = ()
    ended: Callable[[], None] = lambda: None


def run_pack(
    wanted: Sequence[Wanted],
    experiment: str,
    run: Path,
    resources: Resources,
    stop: Stop = never,
    kept: Kept | None = None,
) -> list[TrialRecord]:
    """Run trials that differ at most in their adapters and learning rates; otherwise as ``run_trial``, for each.

    Args:
        wanted: the trials.
        experiment: name of the experiment, for the records.
        run: the run folder.
        resources: of the pack; ``pack`` says whether steps together must be faster.
        stop: whether they are asked to stop.
        kept: what earlier trials of this process have left for them, and they for later ones.
    """
    kept = kept or Kept(0)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    first = wanted[0].spec

    @cache
    def common() -> Common:
        return common_of(first, device, kept, resources, disk_of(resources, run))

    members = []
    for one in wanted:
        folder = run / "trials" / one.spec.trial_id
        trial = Trial(
            one.spec, folder, resources, one.tracker, one.report, rungs=one.rungs, stop=stop, kept=kept, common=common
        )
        trial.measured["pack"] = Packed(members=len(wanted))
        members.append(Member(trial, _course(trial, experiment, one.ended)))
    run_together(members, Together(common, measured=resources.pack == "auto"))
    return [member.result for member in members if member.result is not None]


def _course(trial: Trial, experiment: str, ended: Callable[[], None]) -> Steps[TrialRecord]:
    record = yield from steps_to_record(trial, experiment)
    if record.status not in {"paused", "cancelled"}:
        ended()
    return record


class Together:
    """Training steps of several trials at once.

    Args:
        common: gives what the trials have together.
        measured: whether steps together are given up if they are not faster.

    Attributes:
        measured: whether durations of steps are still compared.
        why_alone: why the trials take their steps alone from now on; empty: they take them together.
    """

    def __init__(self, common: Callable[[], Common], measured: bool) -> None:
        self.why_alone = ""
        self.measured, self._common = measured, common
        self._joint: JointModel | None = None
        self._alone_s: dict[str, list[float]] = {}  # trial → durations of its steps alone
        self._together_s: list[tuple[tuple[str, ...], float]] = []

    def wants_alone(self, member: Member[T]) -> bool:
        """Whether a step of a trial is to be taken alone first: its memory is measured, and perhaps its time."""
        first = member.trial.state.step < WARMUP_STEPS
        return first or (self.measured and len(self._alone_s.get(member.trial.spec.trial_id, ())) < WARMUP_STEPS)

    def took_alone(self, member: Member[T], taken: Taken | Exception) -> None:
        """Note the duration of a step alone."""
        if isinstance(taken, Taken):
            self._alone_s.setdefault(member.trial.spec.trial_id, []).append(taken.duration_s)

    def take(self, members: Sequence[Member[T]], batch: Batch) -> list[Taken | Exception] | None:
        """Take a training step of each trial, on the same batch.

        Returns:
            What came of each; None: nothing was changed, and ``why_alone`` says why it cannot be done.
        """
        started = time.monotonic()
        try:
            losses, gradients = self._drawn_alone(members, batch)
        except Exception as error:  # of no trial in particular: each takes the step alone, and those fail whose it is
            kind = "memory does not suffice" if is_out_of_memory(error) else "that failed"
            self.why_alone = f"{kind}: {type(error).__name__}: {error}".splitlines()[0]
            return None
        taken = self._step(members, losses, gradients, started)
        if self.measured:
            wait_for(members[0].trial.device)
        self._note(members, time.monotonic() - started)
        return taken

    def _drawn_alone(
        self, members: Sequence[Member[T]], batch: Batch
    ) -> tuple[list[float], list[tuple[Tensor | None, ...]]]:
        """``_losses``, with random numbers that each trial draws as it does alone.

        Raises:
            ValueError: the language model draws random numbers.
        """
        shared, own = random_states(), [member.random for member in members]
        whole = False
        try:
            found = self._losses(members, batch)
            whole = _equal(shared, random_states())
        finally:
            set_random_states(shared)
            if not whole:
                for member, states in zip(members, own, strict=True):
                    member.random = states
        if whole:
            return found
        if self._joint is None or self._joint.layers_draw:
            raise ValueError("the language model draws random numbers, such as those of dropout")
        self._joint.layers_draw = True  # adapters have dropout
        return self._drawn_alone(members, batch)

    def _losses(
        self, members: Sequence[Member[T]], batch: Batch
    ) -> tuple[list[float], list[tuple[Tensor | None, ...]]]:
        """The loss of each trial, and its gradients if it is finite."""
        models = [member.trial.stages.built.model for member in members]
        first = self._joint is None
        if self._joint is None:
            self._joint = JointModel(self._common().language_model.model)
        if first:
            self._check(self._joint, members, batch)
        scores = self._joint.score(batch, models, [member.drawing for member in members])
        losses = [nll_R.sum() / tokens_R.sum() for nll_R, tokens_R in scores]
        values: list[float] = torch.stack(losses).tolist()
        parameters = [member.trial.stages.engine.trainable for member in members]
        finite = [index for index, value in enumerate(values) if math.isfinite(value)]
        wanted = [p for index in finite for p in parameters[index]]
        found = iter(torch.autograd.grad([losses[i] for i in finite], wanted, allow_unused=True) if finite else ())
        gradients: list[tuple[Tensor | None, ...]] = [
            tuple(islice(found, len(own))) if index in finite else () for index, own in enumerate(parameters)
        ]
        return values, gradients

    def _check(self, joint: JointModel, members: Sequence[Member[T]], batch: Batch) -> None:
        """Check that each model computes what it computes alone.

        Raises:
            ValueError: it does not.
        """
        models = [member.trial.stages.built.model.eval() for member in members]
        try:
            with torch.no_grad():
                scores = joint.score(batch, models, [nullcontext] * len(models))
                for model, (together_R, _) in zip(models, scores, strict=True):
                    alone_R, _ = model(batch)
                    if alone_R.isfinite().all() and not agrees(together_R, alone_R, model.language_model.dtype):
                        raise ValueError("the language model computes rows otherwise where there are more of them")
        finally:
            for model in models:
                model.train()

    def _step(
        self,
        members: Sequence[Member[T]],
        losses: Sequence[float],
        gradients: Sequence[tuple[Tensor | None, ...]],
        started: float,
    ) -> list[Taken | Exception]:
        asks = [sum(asked) for asked in zip(*(member.trial.stages.engine.asks for member in members), strict=True)]
        taken: list[Taken | Exception] = []
        for member, loss, own in zip(members, losses, gradients, strict=True):
            engine = member.trial.stages.engine
            engine.asked = tuple(asks)  # all save after the same step, and so go on from the same one
            try:
                with member.trial.training_on(member.draws or ()):
                    check_finite(loss)
                    engine.step_with(own)
            except Exception as error:  # of this trial
                taken.append(error)
            else:
                taken.append(Taken(loss, 0.0))
        whole_s = time.monotonic() - started
        for member in members:
            member.trial.took_step(whole_s)
        return [Taken(one.loss, whole_s / len(members)) if isinstance(one, Taken) else one for one in taken]

    def _note(self, members: Sequence[Member[T]], duration_s: float) -> None:
        """Decide, once enough steps were measured, whether they are faster together."""
        ids = tuple(member.trial.spec.trial_id for member in members)
        if not self.measured or any(len(self._alone_s.get(key, ())) < WARMUP_STEPS for key in ids):
            return
        self._together_s.append((ids, duration_s))
        alike = [took_s for key, took_s in self._together_s if key == ids]
        if len(alike) < MEASURED_STEPS:
            return
        self.measured = False
        alone_s = sum(min(self._alone_s[key][1:]) for key in ids)  # the first step allocates
        share = statistics.median(alike[1:]) / alone_s
        said = f"{share:.2f} of the time of {len(ids)} steps alone"
        if share > _FASTER:
            self.why_alone = f"a step of {len(ids)} trials takes {said}"
        logger.info("a step of %d trials together takes %s", len(ids), said)


def run_together(members: Sequence[Member[T]], together: Together) -> None:
    """Run trials to their ends, which their ``result`` has.

    While they take their steps together, those of the fewest steps go on. Otherwise one runs after the other.

    Raises:
        Exception: of the first trial that has no result.
    """
    try:
        for member in members:
            member.go_on()
        while waiting := [member for member in members if member.draws is not None]:
            fewest = min(member.trial.state.step for member in waiting)
            abreast = [member for member in waiting if member.trial.state.step == fewest]
            _take(waiting[:1] if together.why_alone else abreast, together, waiting)
    finally:
        for member in members:
            member.steps.close()
    for member in members:
        if member.error:
            raise member.error


def _take(members: Sequence[Member[T]], together: Together, waiting: Sequence[Member[T]]) -> None:
    """Take a step of trials that have taken the same number of them, and let each go on.

    Args:
        members: the trials.
        together: takes their steps.
        waiting: all trials that have not ended.
    """
    draws = members[0].draws
    if draws is None or any(member.draws != draws for member in members):
        raise RuntimeError("the trials of a pack train on different examples")
    try:
        with members[0].in_turn():
            shared = all(member.trial.stages.shares_rows for member in members)
            batch = members[0].trial.batch(draws, shared)
    except Exception as error:  # as each would have met it alone
        for member in members:
            member.go_on(error)
        return
    alone = [member for member in members if len(members) == 1 or together.wants_alone(member)]
    others = [member for member in members if member not in alone]
    taken, given_up = None, bool(together.why_alone)
    if len(others) > 1 and not given_up:
        taken = together.take(others, batch)
        if together.why_alone:
            _tell(waiting, together.why_alone)
    if taken is None:
        alone, others = [*alone, *others], []
    for member in alone:
        one = member.take(batch, together.measured)
        together.took_alone(member, one)
        member.go_on(one)
    for member, what in zip(others, taken or (), strict=True):
        member.go_on(what)


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def _tell(members: Sequence[Member[T]], why: str) -> None:
    for member in members:
        packed: Packed = member.trial.measured["pack"]
        member.trial.measured["pack"] = packed.model_copy(update={"alone": why})
        with member.in_turn():
            logger.info("takes its training steps alone: %s", why)
