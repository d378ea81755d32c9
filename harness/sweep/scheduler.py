"""The order in which Tune starts trials, and when it pauses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.sweep.grace import PreemptedError
from harness.sweep.halving import HalvedRows
from harness.sweep.members import members_of
from harness.sweep.ray_library import tune


class KeepStartingWorkers(tune.schedulers.FIFOScheduler):  # type: ignore[misc]
    """Starts trials in order, but prefers those for which no worker process is starting.

    Tune requests a worker for each waiting trial, and gives a worker that is free to the trial chosen here, whose own
    request it cancels. A worker that replaces a killed one takes seconds to import its libraries. Were its trial chosen
    meanwhile, which is the first in FIFO order, the worker would be stopped while it starts; with trials shorter than
    its start, this would repeat, and its slot would stay empty to the end of the sweep.
    """

    _watched: Any = None  # the controller whose failures are watched

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Watch the failures of a controller, from its first trial on."""
        controller = getattr(tune_controller.get_trials, "__self__", tune_controller)  # given is a wrapper of it
        if self._watched is controller:
            return
        self._watched, fail = controller, controller._trial_task_failure

        def fail_once(trial: Any, exception: Exception) -> None:
            # A worker that dies while Tune resets it fails its next trial twice: as the actor, after which the trial
            # waits again, and as the task `reset`, which would end it for good whatever `max_failures` is.
            if PreemptedError.__name__ in str(exception):  # its worker was ended, which is no fault of the trial
                trial.max_failures += 1
            if trial.status == "PENDING" and trial in controller._resetting_trials:
                controller._resetting_trials.discard(trial)
            else:
                fail(trial, exception)

        controller._trial_task_failure = fail_once

    def __init__(self, ending: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self._ending = ending

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The first waiting trial without a worker; only if there is none, one whose worker is starting."""
        if self._watched is not None:
            _forget_ended(self._watched)
        if self._ending():
            return None
        waiting = [trial for trial in tune_controller.get_trials() if trial.status == "PENDING"]
        # A trial that already has a reused worker would leave the choice to Tune, which might stop one that starts.
        waiting = [trial for trial in waiting if trial not in tune_controller._resetting_trials]
        workers, manager = tune_controller._trial_to_actor, tune_controller._actor_manager
        unserved = (t for t in waiting if t not in workers or not manager.is_actor_started(workers[t]))
        return next(unserved, next(iter(waiting), None))


def _forget_ended(controller: Any) -> None:
    """Remove the trials that have ended: Tune keeps all, looks at each in every step, and snapshots and returns them.

    What the trials have done is in their folders, and nothing reads Tune's.
    """
    ended = [trial for trial in controller.get_trials() if trial.status in {"TERMINATED", "ERROR"}]
    for trial in (trial for trial in ended if trial not in controller._trial_to_actor):
        controller._trials.remove(trial)
        controller._trial_metadata.pop(trial.trial_id, None)
        for known in (controller._trials_to_cache, controller._stopped_trials, controller._failed_trials):
            known.discard(trial)


@dataclass(frozen=True)
class _Pause:
    rung: int
    waiting: Sequence[str]  # ids of the trials that wait there: one, or those of a pack
    others: int  # of the pack that have not ended, and do not wait there


class HalveRows(KeepStartingWorkers):
    """Pauses trials at the rungs of halving, and lets them go on or prunes them when their row is complete.

    A paused trial has no worker: all that it needs to go on is in its folder. It reports its rung again when it is
    started once more, so what happens depends on the folder alone.

    Args:
        rows: decides, and writes the records of pruned trials.
        ending: whether no trial is started any more.
    """

    def __init__(self, rows: HalvedRows, ending: Callable[[], bool] = lambda: False) -> None:
        super().__init__(ending)
        self._rows = rows
        self._paused: dict[Any, _Pause] = {}
        self._failed: list[Any] = []

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide about a trial that has reached a rung."""
        for trial_id in result.get("ended", ()):
            self._rows.update(trial_id)
        rung = result.get("rung")
        if rung is None:
            return str(self.CONTINUE)
        for trial_id in result["waiting"]:
            self._rows.update(trial_id)
        self._paused[trial] = _Pause(rung, result["waiting"], result["others"])
        goes_on = self._decided(trial)
        if goes_on is None:
            return str(self.PAUSE)
        return str(self.CONTINUE if goes_on else self.STOP)

    def _decided(self, trial: Any) -> bool | None:
        """Whether a trial goes on, or one of a pack that waits; the others are pruned. None: a row is not decided."""
        pause = self._paused[trial]
        found = {trial_id: self._rows.goes_on(trial_id, pause.rung) for trial_id in pause.waiting}
        if None in found.values():
            return None
        del self._paused[trial]
        for trial_id, goes_on in found.items():
            if not goes_on:
                self._rows.prune(trial_id)
        return any(found.values()) or pause.others > 0

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial has ended, and its record is written."""
        for trial_id in members_of(trial):
            self._rows.update(trial_id)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A worker died; whether its trial is tried again, and the record if it is not, come after this call."""
        self._failed.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """End the waiting of trials whose row has been decided, then choose."""
        for trial in self._failed:
            if trial.status == "ERROR":
                for trial_id in members_of(trial):
                    self._rows.update(trial_id)
        self._failed.clear()
        for trial in list(self._paused):
            if trial.status == "PAUSED":
                self._end_waiting(tune_controller, trial)
        return super().choose_trial_to_run(tune_controller)

    def _end_waiting(self, tune_controller: Any, trial: Any) -> None:
        controller = getattr(tune_controller.get_trials, "__self__", tune_controller)
        # Tune adds as many trials as may run at once; one that waits would count as if it ran.
        controller._search_alg.on_trial_complete(trial.trial_id)
        goes_on = self._decided(trial)
        if goes_on:
            controller._set_trial_status(trial, "PENDING")
        elif goes_on is not None:
            controller.stop_trial(trial)
