"""System metrics while a trial runs, for MLflow's page "System metrics"."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping

from harness.tracking.journal import SYSTEM

logger = logging.getLogger(__name__)
Add = Callable[[Mapping[str, float], int], None]
_NOWHERE = "http://127.0.0.1:9"  # the collectors' own client is never used; one of a database would connect to it


class SystemMetrics:
    """Samples system metrics as ``system/…`` in a separate thread; the step is seconds since the run began.

    Uses the collectors of MLflow's ``SystemMetricsMonitor`` but not its loop, which logs nothing for a trial shorter
    than its interval, records psutil's meaningless first CPU value, and waits forever for a server that hangs.

    Args:
        add: receives each sample and its step.
        began_ms: when the run began.
    """

    def __init__(self, add: Add, began_ms: int) -> None:
        self._over = threading.Event()
        weakref.finalize(self, self._over.set)  # Ray may reuse the process of an aborted trial
        self._thread = threading.Thread(target=_sample, args=(self._over, add, began_ms), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample; a collector that hangs delays the trial by at most two seconds."""
        self._over.set()
        self._thread.join(timeout=2)


def _sample(over: threading.Event, add: Add, began_ms: int) -> None:
    import psutil
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    try:
        monitor = SystemMetricsMonitor("", tracking_uri=_NOWHERE)
        process = psutil.Process()
        psutil.cpu_percent()  # its values cover the time since the last call in this thread
        process.cpu_percent()
        ended = False
        while not ended:
            began = time.monotonic()
            ended = over.wait(monitor.sampling_interval)
            if time.monotonic() - began < 1:
                return  # too short for a share of CPU time to mean anything
            monitor.collect_metrics()
            values = {f"{SYSTEM}/{name}": x for name, x in monitor.aggregate_metrics().items()}
            for part in monitor.monitors:
                part.clear_metrics()
            values[f"{SYSTEM}/process_memory_megabytes"] = process.memory_info().rss / 1e6
            values[f"{SYSTEM}/process_cpu_utilization_percentage"] = process.cpu_percent()
            add(values, int(time.time() - began_ms / 1000))
    except Exception:  # from psutil or a GPU driver: must not affect the trial
        logger.warning("system metrics stopped", exc_info=True)
