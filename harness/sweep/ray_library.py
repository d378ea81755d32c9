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

__all__ = ["ray", "tune"]
