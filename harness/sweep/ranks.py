"""A trial of several processes, its workers: Ray actors in the bundles of the trial's placement group.

Tune starts ``run_ranks`` in a process that needs no CPU and imports no torch. It starts an actor for each rank, and
waits. The actors stay for the trials that follow in the same process: a process group cannot be left, so they are a
team, which is disbanded as soon as a trial does not end in all of them alike.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from harness.core.record import PlannedTrial, TrialRecord, write_record
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.sweep.grace import PreemptedError, StopRequest, save_at_sigterm
from harness.sweep.placement import Amounts
from harness.sweep.ray_library import ray, tune
from harness.sweep.rungs import Rungs, run_to_end
from harness.trial.log import LOG, log_to
from harness.trial.outcome import Outcome, conclude

GRACE_S = 10.0  # after one worker has failed, the others are heard for so long
_CONCLUDE_S = 60.0  # for rank 0 to write a record


class RankDiedError(Exception):
    """A worker of the trial died, so the trial starts again from its last checkpoint."""


class Job(NamedTuple):
    """A trial as it is sent to its workers; models are JSON."""

    spec: str
    planned: str
    experiment: str
    run: str
    resources: str
    grid: Any
    rungs: tuple[int, ...] = ()  # epochs after which it pauses


# ── In the driver


def nodes_alive() -> list[Amounts]:
    """The resources of each node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def request(resources: Resources, asked: Amounts) -> Any:
    """What Tune reserves for a trial: with several workers a bundle for each, in which ``run_ranks`` starts them.

    Args:
        resources: of the trial.
        asked: for one worker, from ``per_worker``.
    """
    if resources.workers == 1:
        return {"cpu": asked["CPU"], "gpu": asked["GPU"]}
    bundle = {key: share for key, share in asked.items() if share}
    return tune.PlacementGroupFactory([{}, *([bundle] * resources.workers)])


# ── In the process that waits


def run_ranks(
    config: dict[str, Any], experiment: str, run: str, resources: str, grid: Any, variables: Mapping[str, str]
) -> None:
    """Run one trial with several workers, as Tune's trainable.

    Args:
        config: of the trial, from Tune.
        experiment: name of the experiment.
        run: the run folder.
        resources: of the trial, as JSON.
        grid: where the trial is logged.
        variables: environment of the workers.

    Raises:
        RankDiedError: one died; Tune starts the trial again, ``max_failures`` times.
    """
    trial = config["trial"]

    def attempt(rungs: Rungs) -> bool:
        own = tuple(rungs[trial["trial_id"]])
        job = Job(trial["spec"], trial["planned"], experiment, run, resources, grid, own)
        return _attempt(job, Resources.model_validate_json(resources), variables)

    run_to_end(trial, Path(run), attempt)


def _attempt(job: Job, resources: Resources, variables: Mapping[str, str]) -> bool:
    """Run a trial until the next rung or its end; returns whether it was asked to stop.

    Raises:
        PreemptedError: it was asked by a worker whose process got SIGTERM.
        RankDiedError: one died.
    """
    began = datetime.now(UTC)
    team = _team(resources, variables)
    whole = False  # also if Tune ends the trial inside of `report`
    try:
        heard = _listen(team, job)
        cause = cause_of(heard)
        if cause is not None:
            _conclude(team, job, failed_record(heard, cause, job, began), heard)
        if any(outcome.preempted for outcome in heard.outcomes):
            raise PreemptedError("the process of a worker got SIGTERM")
        whole = len(heard.outcomes) == len(team) and alike(heard.outcomes)
        return any(outcome.status == "cancelled" for outcome in heard.outcomes)
    finally:
        if not whole:
            _disband()


@dataclass(frozen=True)
class Heard:
    """What was heard of the workers of a trial."""

    count: int  # of the workers
    outcomes: tuple[Outcome, ...]  # in the order in which they came
    died: dict[int, str]  # rank → how


def alike(outcomes: Sequence[Outcome]) -> bool:
    """Whether a trial ended in all workers in the same way: it finished, or has the same error but for the place."""
    return len({(outcome.status, (outcome.reason or "").partition(" (")[0]) for outcome in outcomes}) == 1


def cause_of(heard: Heard) -> Outcome | None:
    """The failure that ended a trial; None if it ended without.

    Raises:
        RankDiedError: a worker died or was lost, which is no failure of the trial.
    """
    failures = [outcome for outcome in heard.outcomes if outcome.failed]
    if any(outcome.rank == 0 and not outcome.failed for outcome in heard.outcomes):
        return None  # it has all that the others had to give, and the record is written
    if heard.died:
        rank, how = min(heard.died.items())
        raise RankDiedError(f"rank {rank} of {heard.count} died: {how}")
    if not failures:
        return None
    own = [outcome for outcome in failures if not outcome.lost]
    if not own:
        raise RankDiedError(f"rank {failures[0].rank} of {heard.count} lost another one: {failures[0].reason}")
    everywhere = len(own) == heard.count and alike(own)
    return min(own, key=lambda outcome: outcome.rank) if everywhere else own[0]


def failed_record(heard: Heard, cause: Outcome, job: Job, began: datetime) -> TrialRecord:
    """The record of a trial that failed: as rank 0 knows it, with the error of the rank that failed first."""
    everywhere = len(heard.outcomes) == heard.count and alike(heard.outcomes)
    reason = cause.reason if everywhere else f"rank {cause.rank} of {heard.count}: {cause.reason}"
    known = next((outcome.record for outcome in heard.outcomes if outcome.record is not None), None)
    if known is None:
        spec = TrialSpec.model_validate_json(job.spec)
        known = TrialRecord(
            trial_id=spec.trial_id,
            experiment=job.experiment,
            status="failed",
            spec=spec.model_dump(mode="json"),
            seed=spec.seed,
            wall_time_s=(datetime.now(UTC) - began).total_seconds(),
            started_at=began.isoformat(timespec="seconds"),
            workers=heard.count,
        )
    return known.model_copy(update={"status": cause.status, "reason": reason})


def _listen(team: Sequence[Any], job: Job) -> Heard:
    """Start a trial in its workers, pass on what rank 0 reports, and wait until all have ended.

    After the first failure, the others are heard for ``GRACE_S``: one that waits for the failed one never ends.
    """
    waiting = {actor.run.remote(job): rank for rank, actor in enumerate(team)}
    news = team[0].news.remote()
    outcomes: list[Outcome] = []
    died: dict[int, str] = {}
    deadline: float | None = None
    while waiting:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait([*waiting, *([news] if news else [])], num_returns=1, timeout=left)
        if not ready:
            break
        if ready[0] is news:
            news = _pass_on(team, news)
            continue
        rank = waiting.pop(ready[0])
        try:
            outcomes.append(ray.get(ready[0]))
        except ray.exceptions.RayActorError as error:
            died[rank] = _first_line(error)
        except Exception as error:  # what a worker could not even catch
            outcomes.append(Outcome(rank, "failed", _first_line(error), str(error)))
        if deadline is None and (died or outcomes[-1].failed):
            deadline = time.monotonic() + GRACE_S
    return Heard(len(team), tuple(outcomes), died)


def _pass_on(team: Sequence[Any], news: Any) -> Any:
    """Report to Tune what rank 0 reported, which waits for it, and ask for more; None: the trial has ended there."""
    try:
        progress = ray.get(news)
    except ray.exceptions.RayActorError:  # its run tells
        return None
    if progress is None:
        return None
    tune.report(progress)
    return team[0].news.remote()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _conclude(team: Sequence[Any], job: Job, record: TrialRecord, heard: Heard) -> None:
    """Write the record of a failed trial: in rank 0, which has its tracking, or here if that is gone."""
    others = [f"rank {outcome.rank}:\n{outcome.traceback}" for outcome in heard.outcomes if outcome.rank]
    try:
        ray.get(team[0].conclude.remote(job, record, others), timeout=_CONCLUDE_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        with log_to(Path(job.run) / "trials" / record.trial_id / LOG) as logger:
            logger.error("%s\n%s", record.reason, "\n".join(others))
        write_record(Path(job.run), record)


# ── Teams


_teams: dict[Any, list[Any]] = {}  # placement group → its actors; at most one, that of this process's trials


def _team(resources: Resources, variables: Mapping[str, str]) -> list[Any]:
    """The workers, which have joined a process group: those of the trial before, if they are there, or new ones."""
    group = ray.util.get_current_placement_group()
    if group.id in _teams:
        return _teams[group.id]
    _disband()
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    team = []
    for rank, bundle in enumerate(group.bundle_specs):
        start = ray.remote(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=4,  # while it trains, it is asked for news
            scheduling_strategy=strategy(placement_group=group, placement_group_bundle_index=rank),
        )(Rank)
        team.append(start.remote(rank, resources.workers, bool(bundle.get("GPU", 0)), variables))
    _teams[group.id] = team
    try:
        address = ray.get(team[0].open.remote())
        ray.get([actor.join.remote(address) for actor in team])
    except ray.exceptions.RayActorError as error:
        _disband()
        raise RankDiedError(f"a worker died while it started: {_first_line(error)}") from None
    except BaseException:
        _disband()
        raise
    return team


def _disband() -> None:
    for actor in (actor for team in _teams.values() for actor in team):
        ray.kill(actor)
    _teams.clear()


# ── In a worker


class Rank:
    """One worker of the trials of a team, as a Ray actor. Torch is imported here only."""

    def __init__(self, rank: int, count: int, has_gpu: bool, variables: Mapping[str, str]) -> None:
        save_at_sigterm()
        os.environ.update(variables)
        if not has_gpu:  # otherwise all workers would use the first GPU
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self.rank, self.count = rank, count
        self._news: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._taken = threading.Semaphore(0)
        self._told = False
        self._tracker: Any = None
        self._store: Any = None

    def open(self) -> tuple[str, int]:
        """Open the store in which the team meets, on this node's address and a free port; returns both."""
        from torch._C._distributed_c10d import TCPStore

        host = ray.util.get_node_ip_address()
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = int(listener.getsockname()[1])
        self._store = TCPStore(
            host, port, self.count, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return host, port

    def join(self, address: tuple[str, int]) -> None:
        """Meet the others; this process stays in their group to its end."""
        from torch._C._distributed_c10d import TCPStore

        from harness.trial.engine import import_libraries, join_process_group

        import_libraries()
        store = self._store or TCPStore(*address, self.count, is_master=False)
        join_process_group(store, self.rank, self.count, ray.util.get_node_ip_address())

    def run(self, job: Job) -> Outcome:
        """Run a trial with the others."""
        from harness.tracking.tracker import MlflowTracker, NoTracker
        from harness.trial.worker import run_worker

        spec, planned = TrialSpec.model_validate_json(job.spec), PlannedTrial.model_validate_json(job.planned)
        run, resources, stop = Path(job.run), Resources.model_validate_json(job.resources), StopRequest(Path(job.run))
        first = self.rank == 0
        if first:
            self._tracker = MlflowTracker(job.grid, spec, planned, run / "trials" / spec.trial_id)
        tracker, report = (self._tracker, self._report) if first else (NoTracker(), lambda _: None)
        try:
            with stop.listening():
                outcome = run_worker(spec, job.experiment, run, resources, tracker, report, job.rungs, stop)
            return replace(outcome, preempted=outcome.status == "cancelled" and stop.preempted)
        finally:
            self._news.put(None)

    def _report(self, progress: Any) -> None:
        """Put a report where ``news`` takes it, and wait until Tune has it: it may end the trial there."""
        self._news.put(vars(progress))
        self._taken.acquire()

    def news(self) -> dict[str, Any] | None:
        """The next report of the trial, once Tune has taken the one before; None: the trial has ended."""
        if self._told:
            self._taken.release()
        progress = self._news.get()
        self._told = progress is not None
        return progress

    def conclude(self, job: Job, record: TrialRecord, others: Sequence[str]) -> None:
        """Write the record of a trial that failed, and log the tracebacks of other ranks."""
        run = Path(job.run)
        with log_to(run / "trials" / record.trial_id / LOG) as logger:
            for lines in others:
                logger.error("%s", lines)
            conclude(record, run, self._tracker)
