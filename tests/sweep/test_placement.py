"""What the workers of a trial need of a Ray cluster, and how many trials fit."""

from __future__ import annotations

from typing import Any

import pytest

from harness.core.errors import UserError
from harness.experiment.sections import Resources
from harness.sweep.placement import at_once, per_worker

TWO_NODES = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}]


def test_auto_uses_a_gpu_if_there_is_one() -> None:
    assert per_worker(Resources(), [{"CPU": 2.0}]) == {"CPU": 1, "GPU": 0}
    assert per_worker(Resources(), TWO_NODES) == {"CPU": 1, "GPU": 1}
    a_part = Resources(gpus_per_worker=0.25, cpus_per_worker=2)
    assert per_worker(a_part, TWO_NODES) == {"CPU": 2, "GPU": 0.25}


@pytest.mark.parametrize(
    ("resources", "nodes", "message"),
    [
        ({"cpus_per_worker": 16}, TWO_NODES, r"cpus_per_worker: found 16, .* has 8 CPUs \(2 nodes, 12 in all\)"),
        ({"gpus_per_worker": 1.0}, [{"CPU": 2.0}], r"gpus_per_worker: found 1, .* has 0 GPUs \(1 node, 0 in all\)"),
        ({"gpus_per_worker": 3.0}, TWO_NODES, r"gpus_per_worker: found 3, .* has 2 GPUs \(2 nodes, 2 in all\)"),
        (
            {"workers": 3},
            TWO_NODES,
            r"workers: found 3, each with 1 CPUs and 1 GPUs, .* room for 2 \(the largest node has 8 CPUs and 2 GPUs; "
            r"2 nodes, 12 CPUs and 2 GPUs in all\)",
        ),
        ({"workers": 2, "cpus_per_worker": 8, "gpus_per_worker": 0}, TWO_NODES, r"workers: found 2, .* room for 1 "),
        # Each is there, but not on one node.
        ({"cpus_per_worker": 6, "gpus_per_worker": 1}, [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 1.0}], r"workers: found 1, "),
    ],
)
def test_what_is_short_is_named(resources: dict[str, Any], nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(UserError, match=rf"^resources\.{message}"):
        per_worker(Resources(**resources), nodes)


@pytest.mark.parametrize(
    ("resources", "nodes", "expected"),
    [
        (Resources(), [{"CPU": 2.0}], 2),
        (Resources(cpus_per_worker=2), [{"CPU": 5.0}], 2),
        (Resources(cpus_per_worker=2), [{"CPU": 5.0}, {"CPU": 3.0}], 3),
        (Resources(gpus_per_worker=0.1), [{"CPU": 64.0, "GPU": 1.0}], 10),
        (Resources(gpus_per_worker=0.4), [{"CPU": 64.0, "GPU": 2.0}], 4),  # two on each GPU, none on both
        (Resources(max_concurrent_trials=3), [{"CPU": 64.0}], 3),
        (Resources(), [{"CPU": 64.0}], 20),
        (Resources(workers=2), [{"CPU": 4.0}, {"CPU": 3.0}], 3),
        (Resources(workers=4), TWO_NODES[1:], 1),
    ],
)
def test_how_many_trials_run_at_once(resources: Resources, nodes: list[dict[str, float]], expected: int) -> None:
    assert at_once(resources, per_worker(resources, nodes), nodes, 20) == expected
