"""Tune's events, and records of trials whose process died; tests/e2e runs whole sweeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.core.errors import SweepEndedError
from harness.sweep import events as module


def test_a_sweep_whose_last_node_died_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune would wait forever for a node that can run the next trial."""
    asked: list[bool] = []
    nodes = [{"NodeID": key, "NodeManagerAddress": f"10.0.0.{key}", "NodeName": "", "Alive": True} for key in "12"]
    notes: list[str] = []
    monkeypatch.setattr(module.ray, "nodes", lambda: asked.append(True) or nodes)
    events = module.Events(tmp_path, "x", SimpleNamespace(noted=notes.append))  # type: ignore[arg-type]
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
