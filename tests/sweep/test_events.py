"""Tune's events, and records of trials whose process died; tests/e2e runs whole sweeps."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.errors import SweepEndedError
from harness.sweep import events as module


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The second node of a cluster; the first one is too small for a trial."""
    found = {"NodeID": "2", "NodeManagerAddress": "10.0.0.2", "NodeName": "", "Alive": True, "Resources": {"CPU": 8.0}}
    small = {**found, "NodeID": "1", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(module.ray, "nodes", lambda: [small, found])
    monkeypatch.setattr(module.ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(module, "_NODES_S", 0.0)
    return found


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
    waiting, running = [SimpleNamespace(status="PENDING")], [SimpleNamespace(status="RUNNING")]
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
    events.on_step_begin(0, [])
    assert not asked, "not at every step"
    events.asked -= module._NODES_S
    events.on_step_begin(1, [])
    nodes[0]["Alive"] = False
    events.on_step_begin(2, [])
    assert len(asked) == 1
    events.asked -= module._NODES_S
    events.on_step_begin(3, [])
    assert notes == ["node 10.0.0.1 has died; its trials start again on another one"]
    nodes[1]["Alive"] = False
    events.asked -= module._NODES_S
    with pytest.raises(SweepEndedError, match=r"^Ray has died: one of its processes \(raylet, DashboardAgent, Runtime"):
        events.on_step_begin(3, [])
