"""Tune's events, and records of trials whose process died; tests/e2e runs whole sweeps."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.errors import SweepEndedError
from harness.core.record import read_record, record_path, write_record
from harness.sweep import events as module
from harness.sweep.hangs import Hangs
from tests.support.runs import fake_plan
from tests.support.trials import spec_of


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The second node of a cluster; the first one is too small for a trial."""
    found = {"NodeID": "2", "NodeManagerAddress": "10.0.0.2", "NodeName": "", "Alive": True, "Resources": {"CPU": 8.0}}
    small = {**found, "NodeID": "1", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(module.ray, "nodes", lambda: [small, found])
    monkeypatch.setattr(module.ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(module, "_NODES_S", 0.0)
    return found


def running_trial(trial_id: str = "a") -> Any:
    actor = SimpleNamespace(ray_actor=f"actor of {trial_id}")
    planned = fake_plan().trials[0].model_copy(update={"trial_id": trial_id})
    packed = {"trial_id": trial_id, "planned": planned.model_dump_json()}
    packed["members"] = [dict(packed)]
    return SimpleNamespace(status="RUNNING", config={"trial": packed}, temporary_state=actor, max_failures=3)


def test_a_trial_without_progress_is_killed_and_not_started_again(
    tmp_path: Path, node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []
    monkeypatch.setattr(module.ray, "kill", killed.append)
    hangs = Hangs(30.0)
    quiet: Any = SimpleNamespace(started=lambda *_: None, progressed=lambda *_: None)
    events = module.Events(tmp_path, "x", quiet, {"CPU": 1.0}, hangs=hangs)
    stuck, well = running_trial("stuck"), running_trial("well")
    for trial in (stuck, well):
        events.on_trial_start(0, [], trial)
    events.on_trial_result(0, [], stuck, {"phase": "test"})
    for _ in range(4):  # more than 30 s; a driver that stood still for an hour counts 10 of them
        hangs._looked -= 3600.0
        events.on_trial_result(0, [], well, {"phase": "train"})
        events.on_step_begin(1, [stuck, well, SimpleNamespace(status="PENDING")])
    assert killed == ["actor of stuck"]
    assert (stuck.max_failures, well.max_failures) == (0, 3)
    assert events._cause("stuck") == ("failed", "no progress for 30 s (in phase test)")
    assert events._cause("well") is None


def test_the_trials_of_a_pack_are_told_of_one_by_one(tmp_path: Path) -> None:
    """One has ended before the worker died for the last time; the others get records that say so."""
    seen: list[str] = []
    display: Any = SimpleNamespace(
        started=lambda trial_id, place: seen.append(f"{trial_id} started at {place}"),
        progressed=lambda trial_id, progress: seen.append(f"{trial_id} {progress['phase']}"),
        ended=lambda record: seen.append(f"{record.trial_id} {record.status}"),
    )
    events = module.Events(tmp_path, "x", display, {"CPU": 1.0})
    specs = [spec_of(tmp_path, {"method": "lora", "rank": rank, "learning_rate": 1e-3}) for rank in (1, 2, 3)]
    first, second, third = (spec.trial_id for spec in specs)
    members = [{"trial_id": spec.trial_id, "spec": spec.model_dump_json()} for spec in specs]
    pack = SimpleNamespace(
        config={"trial": {**members[0], "members": members}},
        run_metadata=SimpleNamespace(start_time=None),
        failure="The actor died unexpectedly",
    )
    events.on_trial_start(0, [], pack)
    assert seen == [f"{trial_id} started at {first}" for trial_id in (first, second, third)]
    seen.clear()
    events.on_trial_result(0, [], pack, {"phase": "train", "members": {second: {"phase": "train"}}})
    record = module._died(pack, second, "x", tmp_path / "log.txt", None)
    write_record(tmp_path, record.model_copy(update={"status": "finished"}))
    events.on_trial_result(0, [], pack, {"phase": "train", "members": {}, "ended": [second]})
    events.on_trial_result(0, [], pack, {"phase": "paused", "waiting": [first]})
    events.on_trial_result(0, [], pack, {"phase": "stopped"})
    told = [f"{second} train", f"{second} finished", f"{first} paused", f"{first} stopped", f"{third} stopped"]
    assert (seen, events.ended) == (told, 1)
    seen.clear()
    events.on_trial_error(0, [], pack)
    assert (seen, events.ended) == ([f"{first} failed", f"{third} failed"], 3)
    reason = read_record(record_path(tmp_path, third)).reason or ""
    assert reason.startswith("the worker process died: The actor died unexpectedly; it ran 3 trials (log: ")


@pytest.mark.parametrize(
    ("before", "after", "nodes", "told"),
    [
        (4, 5, {"1"}, True),
        (4, 4, {"1"}, False),
        (None, 5, {"1"}, False),
        (4, None, {"1"}, False),
        (4, 5, {"1", "2"}, False),
    ],
)
def test_a_worker_that_died_while_the_kernel_killed_for_memory_was_out_of_memory(
    before: int | None, after: int | None, nodes: set[str], told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet: Any = SimpleNamespace(started=lambda *_: None)
    events = module.Events(tmp_path, "x", quiet, {"CPU": 1.0})
    events.alive = nodes
    monkeypatch.setattr(module, "oom_kills", lambda: before)
    events.on_trial_start(0, [], running_trial("a"))
    monkeypatch.setattr(module, "oom_kills", lambda: after)
    cause = events._cause("a")
    expected = ("out_of_memory", "the kernel killed the worker process because there was no memory")
    assert cause == (expected if told else None)


def test_nodes_that_are_left_and_too_small_for_a_trial_end_the_sweep_unless_others_return(
    tmp_path: Path, node: dict[str, Any]
) -> None:
    """Tune would wait forever."""
    notes: list[str] = []
    display: Any = SimpleNamespace(noted=notes.append)
    events = module.Events(tmp_path, "x", display, {"CPU": 4.0}, workers=2)
    events.on_step_begin(0, [])
    node["Alive"] = False
    events.on_step_begin(1, [])
    short = "the nodes that are left have room for 0 of 2 workers of a trial (2 × 4 CPUs)"
    assert notes[1:] == [f"{short}; waiting up to 5 min for nodes to come back"]
    node["Alive"] = True
    events.on_step_begin(2, [])
    assert events.short_since is None
    node["Alive"] = False
    events.on_step_begin(3, [])
    events.short_since = events.short_since and events.short_since - module._RETURN_S
    with pytest.raises(SweepEndedError, match=re.escape(short)):
        events.on_step_begin(4, [])


def test_a_sweep_that_waits_for_other_jobs_says_so_once(tmp_path: Path, node: dict[str, Any]) -> None:
    notes: list[str] = []
    display: Any = SimpleNamespace(noted=notes.append)
    events = module.Events(tmp_path, "x", display, {"CPU": 4.0})
    waiting, running = [SimpleNamespace(status="PENDING")], [running_trial()]
    for trials in (waiting, running, waiting):
        events.on_step_begin(0, trials)
    assert notes == []
    for _ in range(2):
        events.ran -= module._WAIT_S
        events.on_step_begin(1, waiting)
    assert notes == ["no trial is running: waiting for 4 CPUs; free in the cluster: 1 CPUs"]


def test_a_sweep_whose_last_node_died_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune would wait forever for a node that can run the next trial."""
    asked: list[bool] = []
    nodes = [
        {"NodeID": key, "NodeManagerAddress": f"10.0.0.{key}", "NodeName": "", "Alive": True, "Resources": {"CPU": 2.0}}
        for key in "12"
    ]
    notes: list[str] = []
    monkeypatch.setattr(module.ray, "nodes", lambda: asked.append(True) or nodes)
    display: Any = SimpleNamespace(noted=notes.append)
    events = module.Events(tmp_path, "x", display, {"CPU": 1.0})
    events.on_step_begin(1, [])  # the first step: a node may die before the next time
    nodes[0]["Alive"] = False
    events.on_step_begin(2, [])
    assert len(asked) == 1, "not at every step"
    events.asked -= module._NODES_S
    events.on_step_begin(3, [])
    assert notes == ["node 10.0.0.1 has died; its trials start again on another one"]
    nodes[1]["Alive"] = False
    events.asked -= module._NODES_S
    with pytest.raises(SweepEndedError, match=r"^Ray has died: one of its processes \(raylet, DashboardAgent, Runtime"):
        events.on_step_begin(3, [])


ACTOR = "The actor died unexpectedly before finishing this task."
TOLD = {
    "a process": ([ACTOR, "class_name: ImplicitFunc"], ACTOR),
    "a task": (
        ["\x1b[36mray::ResourceTrainable.train()\x1b[39m (pid=7)", "  File", "OSError: [Errno 28] No space left"],
        "OSError: [Errno 28] No space left",
    ),
    "a rank": (
        ["ray::ImplicitFunc.train() (pid=7)", "harness.sweep.ranks.RankDiedError: rank 1 of 2 died: killed", "more"],
        "rank 1 of 2 died: killed",
    ),
    "nothing": ([], "Ray gave no reason"),
}


@pytest.mark.parametrize(("lines", "told"), TOLD.values(), ids=TOLD)
def test_of_rays_error_the_line_that_says_why_is_told(lines: list[str], told: str) -> None:
    assert module._told(lines) == told
