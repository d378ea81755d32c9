"""SIGTERM and a request in the run folder end a run as Ctrl-C does; what has finished is reported."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

import harness
from harness.sweep import run, stopping
from harness.sweep.stopping import REQUEST, handler_kept, request_stop, stoppable

EXPERIMENT = harness.Experiment(
    name="grid",
    task={"name": "scenes", "train_examples": 8, "validation_examples": 4, "test_examples": 4},
    adapters=[{"method": "none", "learning_rate": 1e-2}],
)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)  # the handler runs here


def test_a_run_that_gets_sigterm_reports_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_run_unfinished", lambda *_: terminate())
    before = signal.getsignal(signal.SIGTERM)
    shown = io.StringIO()
    results = harness.run_experiment(EXPERIMENT, tmp_path, console=Console(file=shown))
    assert (results.stopped, results.complete) == ("signal", False)
    assert "ended by SIGTERM: finished trials are kept; run the same experiment again" in shown.getvalue()
    assert results.report is not None
    assert results.report.is_file()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_is_interrupted_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run, "_run_unfinished", interrupted)
    shown = io.StringIO()
    results = harness.run_experiment(EXPERIMENT, tmp_path, console=Console(file=shown))
    assert (results.stopped, results.complete) == ("interrupt", False)
    assert "interrupted: finished trials are kept; run the same experiment again" in shown.getvalue()


def test_a_request_in_the_run_folder_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "POLL_S", 0.01)
    request_stop(tmp_path)  # of an earlier run: removed
    with pytest.raises(KeyboardInterrupt, match=r"^$"), stoppable(tmp_path) as stop:  # noqa: PT012
        assert not (tmp_path / REQUEST).exists()
        request_stop(tmp_path)
        try:
            time.sleep(5)
        except KeyboardInterrupt:
            assert stop.reason == "request"
            stop.reason = None  # as if Ctrl-C had been pressed
            raise


def test_a_signal_before_there_is_anything_to_report_ends_the_process(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="143"), stoppable(tmp_path):
        terminate()


def test_a_second_signal_does_not_interrupt_the_report(tmp_path: Path) -> None:
    with stoppable(tmp_path) as stop:
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            terminate()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert stop.reason == "signal"


def test_where_something_else_handles_ctrl_c_it_handles_sigterm_too(tmp_path: Path) -> None:
    """Tune stops its trials and returns; in the background of a script SIGINT is ignored."""
    seen: list[int] = []
    with stoppable(tmp_path) as stop:
        signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert (seen, stop.reason) == ([signal.SIGINT], "signal")
        stop.reason = None
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            terminate()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def rays_handler(number: int, _: object) -> None:
    sys.exit(number)


def test_the_handler_survives_ray_and_gets_what_rays_took(tmp_path: Path) -> None:
    with stoppable(tmp_path) as stop:
        ours = signal.getsignal(signal.SIGTERM)
        with handler_kept():
            signal.signal(signal.SIGTERM, rays_handler)
        assert (signal.getsignal(signal.SIGTERM), stop.reason) == (ours, None)
        with pytest.raises(KeyboardInterrupt, match=r"^$"), handler_kept():  # noqa: PT012
            signal.signal(signal.SIGTERM, rays_handler)
            terminate()
        assert (signal.getsignal(signal.SIGTERM), stop.reason) == (ours, "signal")


def test_outside_the_main_thread_nothing_is_listened_to(tmp_path: Path) -> None:
    request_stop(tmp_path)

    def body() -> None:
        with stoppable(tmp_path):
            assert (tmp_path / REQUEST).exists()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("end", "said"), [("pass", ""), ("quiet(); os._exit(1)", ""), ("os.kill(os.getpid(), 9)", "the last words\n")]
)
def test_a_process_that_ends_within_a_sweep_leaves_its_last_words(end: str, said: str) -> None:
    code = "import os\nfrom harness.sweep.stopping import last_words\nwith last_words('the last words') as quiet:\n    "
    ended = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, timeout=100)  # noqa: PLW1510
    assert (ended.stdout, ended.stderr) == ("", said)
