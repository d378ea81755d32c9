"""What the workers of a trial need of a Ray cluster, whether it is there, and how many trials fit at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from harness.core.cursor import Cursor
from harness.core.errors import UserError
from harness.experiment.sections import Resources

Amounts = Mapping[str, float]  # "CPU", "GPU" → how many
_SECTION = Cursor() / "resources"


def this_machine() -> Amounts:
    """What a Ray that is started here has at most; it counts less where it is confined."""
    import torch  # not in every process that asks what fits

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def per_worker(resources: Resources, nodes: Sequence[Amounts], where: Cursor = _SECTION) -> Amounts:
    """What Ray reserves for one worker of a trial.

    Args:
        resources: of a trial.
        nodes: the resources of each node.
        where: location of the section.

    Raises:
        UserError: one worker does not fit on any node, or not all workers of a trial fit on all; Ray would wait for
            them forever. The message has the key, what was asked, the largest node and the whole cluster.
    """
    largest = {key: max((node.get(key, 0.0) for node in nodes), default=0.0) for key in ("CPU", "GPU")}
    total = {key: sum(node.get(key, 0.0) for node in nodes) for key in largest}
    gpus = min(1.0, largest["GPU"]) if resources.gpus_per_worker == "auto" else float(resources.gpus_per_worker)
    asked = {"CPU": float(resources.cpus_per_worker), "GPU": gpus}
    count = f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
    for key, name in (("CPU", "cpus_per_worker"), ("GPU", "gpus_per_worker")):
        if asked[key] > largest[key]:
            raise UserError(
                f"{where / name}: found {asked[key]:g}, but the largest node of this machine or Ray cluster has "
                f"{largest[key]:g} {key}s ({count}, {total[key]:g} in all)"
            )
    if (room := room_for(asked, nodes)) < resources.workers:
        needs, has, all_have = (f"{x['CPU']:g} CPUs and {x['GPU']:g} GPUs" for x in (asked, largest, total))
        raise UserError(
            f"{where / 'workers'}: found {resources.workers}, each with {needs}, but this machine or Ray cluster has "
            f"room for {room} (the largest node has {has}; {count}, {all_have} in all)"
        )
    return asked


def room_for(asked: Amounts, nodes: Sequence[Amounts]) -> int:
    """How many workers fit on the nodes; each is on one node, and a part of a GPU on one GPU."""
    return sum(min(_times(node.get(key, 0.0), share) for key, share in asked.items() if share) for node in nodes)


def _times(there: float, share: float) -> int:
    if share < 1:
        return int(there + 1e-9) * int(1 / share + 1e-9)
    return int(there / share + 1e-9)


def at_once(resources: Resources, asked: Amounts, nodes: Sequence[Amounts], trials: int) -> int:
    """How many of so many trials run at once.

    Args:
        resources: of a trial.
        asked: from ``per_worker``.
        nodes: the resources of each node.
        trials: to be run.
    """
    return min(room_for(asked, nodes) // resources.workers, trials, resources.max_concurrent_trials or trials)
