"""Imports Ray, with the settings that it reads when it is imported. No other module imports ray directly."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Ray reads these when it is imported: loopback only, no usage statistics, quiet, and no memory monitor. If the monitor
# kills a worker, Tune does not handle the error and the whole sweep ends; if the kernel does, only that trial fails.
_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in an experiment must also work in a worker
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # harness.sweep.grace has another, which lets running trials save
    "TUNE_GLOBAL_CHECKPOINT_S": "60",  # Tune's snapshots are never read
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
for _key, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_key, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray._common.network_utils import is_localhost  # noqa: E402
from ray._private import ray_constants, services  # noqa: E402
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # noqa: E402
from ray.tune.analysis import ExperimentAnalysis  # noqa: E402
from ray.tune.execution import class_cache  # noqa: E402
from ray.tune.experiment import Trial  # noqa: E402
from ray.tune.trainable.function_trainable import wrap_function  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

# Of those above, what workers of a cluster that others have started need too.
WORKER_SETTINGS = {
    name: os.environ[name]
    for name in ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "TOKENIZERS_PARALLELISM")
}
# Tune passes these on in the runtime environment of its actors, which Ray writes into its logs with the values. Workers
# inherit them on this machine, and get them in the arguments of their trials on others.
class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
# What `fit` returns is not used. Where all trials have been forgotten, it would unpickle Tune's newest snapshot in the
# run folder, which may be somebody else's, and fail if the snapshot is of a sweep that had none.
ExperimentAnalysis._load_trials = lambda _: []
_count_failure = Trial.handle_error


def _handle_error(trial: Trial, error: Exception | None = None) -> None:
    """Keep what a trial failed of: Tune counts the failure, then writes it to files, for which a disk may be full."""
    trial.failure = str(error)
    with suppress(OSError):
        _count_failure(trial, error)


Trial.handle_error = _handle_error
_TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable
__all__ = [
    "WORKER_SETTINGS",
    "NodeAffinitySchedulingStrategy",
    "address_of",
    "own_token",
    "ray",
    "tune",
    "wrap_function",
]


@contextmanager
def own_token() -> Iterator[None]:
    """Give the Ray that this process starts a token of its own: what has not got it can ask that Ray for nothing.

    It is in the environment of its processes and in no file; Ray would make one for all its clusters, which everybody
    who may enter the home folder can read. A token that was named to this process is used instead.
    """
    if _TOKEN in os.environ or f"{_TOKEN}_PATH" in os.environ:
        yield
        return
    os.environ[_TOKEN] = secrets.token_hex(32)
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        del os.environ[_TOKEN]
        AuthenticationTokenLoader.instance().reset_cache()


def address_of(wanted: str) -> str:
    """``HOST:PORT`` of a running cluster, for ``auto`` that of the cluster that this machine is a node of.

    This process then uses the machine's own address, as a driver of several machines must, unless the host is loopback.

    Raises:
        ConnectionError: ``auto``, and there is none, or several.
    """
    found = str(services.canonicalize_bootstrap_address_or_die(wanted)) if wanted == "auto" else wanted
    ray_constants.ENABLE_RAY_CLUSTER = not is_localhost(found.rpartition(":")[0].strip("[]"))
    return found
