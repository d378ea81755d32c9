"""How trials learn that they should stop, and how long a sweep waits for them."""

from __future__ import annotations

import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.storage import Folder
from harness.sweep import grace
from harness.sweep.grace import REQUEST, Grace, Request, StopRequest, save_at_sigterm


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The signals and the state of the process as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    grace._terminated.clear()


# ── In a trial


def test_a_trial_looks_for_the_request_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(grace.time, "monotonic", lambda: now[0])
    asked = StopRequest(tmp_path)
    assert not asked()
    Request(tmp_path).make()
    now[0] += 0.5
    assert not asked()
    now[0] += 0.6
    assert asked()
    assert not asked.preempted
    Request(tmp_path).withdraw()
    now[0] += 2
    assert asked(), "it stays asked"


def test_a_run_folder_that_does_not_answer_has_no_request(tmp_path: Path) -> None:
    assert not StopRequest(tmp_path / "gone")()


def test_a_trial_asks_a_storage_in_a_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(grace, "_LOOK_AT_URL_S", 0.01)
    url = f"file://{tmp_path / 'there'}"
    asked = StopRequest(tmp_path / "copy", url)
    with asked.listening():
        time.sleep(0.05)
        assert not asked()
        Request(tmp_path / "copy", Folder(url)).make()
        deadline = time.monotonic() + 10
        while not asked():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_sigterm_stops_the_trial_of_a_process_and_without_one_does_what_it_did(tmp_path: Path) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    save_at_sigterm()
    asked = StopRequest(tmp_path)
    signal.raise_signal(signal.SIGTERM)
    assert (seen, asked()) == ([signal.SIGTERM], False)
    with asked.listening():
        signal.raise_signal(signal.SIGTERM)
        assert (seen, asked(), asked.preempted) == ([signal.SIGTERM], True, True)
        signal.raise_signal(signal.SIGTERM)  # a second one ends it at once
    assert seen == [signal.SIGTERM] * 2


# ── In the driver


class Driver:
    """A grace of ten seconds, and what it did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.now, self.folder, self.noted, self.ended = 100.0, folder, list[str](), 0
        monkeypatch.setattr(grace.time, "monotonic", lambda: self.now)
        self.grace = Grace(10.0, Request(folder), self.noted.append)

    @property
    def asked(self) -> bool:
        return (self.folder / REQUEST).exists()

    def end(self, *_: Any) -> None:
        self.ended += 1


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(monkeypatch, tmp_path)
    Request(tmp_path).make()  # of a driver that was killed
    with driver.grace.listening():
        assert not driver.asked
        signal.signal(signal.SIGUSR1, driver.end)  # as Tune does
        yield driver
    assert not driver.asked, "it is withdrawn"


def trials(*states: str) -> list[Any]:
    config = {"trial": {"members": [{"trial_id": "a"}]}}
    return [SimpleNamespace(status=state, config=config) for state in states]


def test_a_sweep_ends_when_the_trials_that_ran_have_stopped(driver: Driver) -> None:
    found = trials("RUNNING", "RUNNING", "PENDING", "TERMINATED")
    driver.grace.check(found)
    assert not driver.grace.ending
    signal.raise_signal(signal.SIGINT)
    assert driver.grace.ending
    driver.grace.check(found)
    assert driver.asked
    assert driver.noted == ["2 running trials may save where they are, for 10 s; Ctrl-C ends them at once"]
    found[0].status, found[2].status = "TERMINATED", "RUNNING"  # the last one has stopped before it began
    driver.grace.check(found)
    assert driver.ended == 0
    found[1].status = "TERMINATED"
    driver.grace.check(found)
    assert driver.ended == 1


def test_a_sweep_without_running_trials_ends_at_once(driver: Driver) -> None:
    signal.raise_signal(signal.SIGINT)
    driver.grace.check(trials("PENDING"))
    assert (driver.ended, driver.noted) == (1, [])


def test_a_sweep_waits_no_longer_than_its_grace(driver: Driver) -> None:
    found = trials("RUNNING")
    signal.raise_signal(signal.SIGINT)
    driver.grace.check(found)
    driver.now += 9.9
    driver.grace.check(found)
    assert driver.ended == 0
    driver.now += 0.2
    driver.grace.check(found)
    assert driver.ended == 1


def test_ctrl_c_a_second_time_ends_it_at_once_and_a_third_time_interrupts(driver: Driver) -> None:
    driver.grace.check(trials("RUNNING"))
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert driver.ended == 1
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        signal.raise_signal(signal.SIGINT)


def test_before_tune_listens_ctrl_c_a_second_time_interrupts(driver: Driver) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        signal.raise_signal(signal.SIGINT)


def test_tune_can_pickle_it(driver: Driver) -> None:
    """It does so with its scheduler, which asks it; a live table has a lock."""
    driver.grace.lock = threading.RLock()  # type: ignore[attr-defined]
    assert isinstance(pickle.loads(pickle.dumps(driver.grace)), Grace)
