"""Measures the memory of one way to run trials, in a process of its own: ``… memory_process ARM WARM_UP WORK OUT``.

ARM is ``ours`` (WARM_UP and WORK are lists of specs, of a pack if there are several) or ``peft`` (jobs of the
comparator). The warm-up is a small run of the same kind, which loads libraries and fills caches; what the second run
adds to the resident memory is what the work needs. Resident memory is sampled, as runs reset the high-water mark.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.speed.measure import pss_bytes

_SAMPLE_S = 0.004
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most resident memory inside a block, and the most of it that is no other process's too."""

    def __init__(self) -> None:
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before_bytes = self.rss_bytes = resident_bytes()
        self.pss_bytes = 0

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        number = 0
        while not self._ends.wait(_SAMPLE_S):
            self.rss_bytes = max(self.rss_bytes, resident_bytes())
            if number % 50 == 0:
                self.pss_bytes = max(self.pss_bytes, pss_bytes(os.getpid()))
            number += 1


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE


def run_ours(specs: list[dict[str, Any]]) -> None:
    """Run one trial, or several as a pack."""
    from harness.experiment.plan import TrialSpec
    from harness.experiment.sections import Resources
    from harness.tracking.tracker import NoTracker
    from harness.trial.attempt import run_trial

    found = [TrialSpec.model_validate_json(json.dumps(spec)) for spec in specs]
    with tempfile.TemporaryDirectory() as folder:
        if len(found) == 1:
            records = [run_trial(found[0], "memory", Path(folder), Resources(), NoTracker(), lambda _: None)]
        else:
            from harness.trial.pack import Wanted, run_pack

            wanted = [Wanted(spec, NoTracker(), lambda _: None) for spec in found]
            resources = Resources.model_validate({"pack": len(found)})
            records = run_pack(wanted, "memory", Path(folder), resources)
    for record in records:
        if record.status != "finished":
            raise SystemExit(f"{record.trial_id}: {record.status}: {record.reason}")


def run_peft(job: dict[str, Any]) -> None:
    """Run one job of the comparator."""
    from benchmarks.comparators.trainer_peft import Job, run

    run(Job(**job))


def main() -> None:
    """Warm up, then measure."""
    arm, warm_up, work, out = sys.argv[1:]
    function: Any = {"ours": run_ours, "peft": run_peft}[arm]
    function(json.loads(Path(warm_up).read_text(encoding="utf-8")))
    gc.collect()
    with Peak() as peak:
        function(json.loads(Path(work).read_text(encoding="utf-8")))
    found = {"growth": peak.rss_bytes - peak.before_bytes, "rss": peak.rss_bytes, "pss": peak.pss_bytes}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
