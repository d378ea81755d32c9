"""Imports Ray, with the settings that it reads when it is imported. No other module imports ray directly."""

from __future__ import annotations

import os

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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

# Of those above, what workers of a cluster that others have started need too.
WORKER_SETTINGS = {
    name: os.environ[name]
    for name in ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "TOKENIZERS_PARALLELISM")
}
__all__ = ["WORKER_SETTINGS", "NodeAffinitySchedulingStrategy", "address_of", "ray", "tune"]


def address_of(wanted: str) -> str:
    """``HOST:PORT`` of a running cluster, for ``auto`` that of the cluster that this machine is a node of.

    This process then uses the machine's own address, as a driver of several machines must, unless the host is loopback.

    Raises:
        ConnectionError: ``auto``, and there is none, or several.
    """
    found = str(services.canonicalize_bootstrap_address_or_die(wanted)) if wanted == "auto" else wanted
    ray_constants.ENABLE_RAY_CLUSTER = not is_localhost(found.rpartition(":")[0].strip("[]"))
    return found
