"""Delivers a run to MLflow in processes that are killed: ``… killed_syncs FOLDER TIMES SEED``; prints how many were."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys

from harness.sweep.sync import sync_run
from harness.tracking.store import import_libraries

if __name__ == "__main__":
    folder, times, seed = sys.argv[1:]
    import_libraries("sqlite:")
    draw, forked, killed = random.Random(seed), multiprocessing.get_context("fork"), 0
    for _ in range(int(times)):
        process = forked.Process(target=sync_run, args=(folder,))
        process.start()
        process.join(draw.uniform(0.1, 5.0))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    sys.stdout.write(str(killed))
