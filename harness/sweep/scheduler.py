"""The order in which Tune starts trials."""

from __future__ import annotations

from typing import Any

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
            if trial.status == "PENDING" and trial in controller._resetting_trials:
                controller._resetting_trials.discard(trial)
            else:
                fail(trial, exception)

        controller._trial_task_failure = fail_once

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The first waiting trial without a worker; only if there is none, one whose worker is starting."""
        waiting = [trial for trial in tune_controller.get_trials() if trial.status == "PENDING"]
        # A trial that already has a reused worker would leave the choice to Tune, which might stop one that starts.
        waiting = [trial for trial in waiting if trial not in tune_controller._resetting_trials]
        workers, manager = tune_controller._trial_to_actor, tune_controller._actor_manager
        unserved = (t for t in waiting if t not in workers or not manager.is_actor_started(workers[t]))
        return next(unserved, next(iter(waiting), None))
