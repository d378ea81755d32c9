"""Refuses trials that surely do not fit: those whose weights alone are larger than the memory of a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clusters.profiles import Profile
from harness.core.cursor import Cursor
from harness.core.errors import UserError
from harness.core.forecast import GIB
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.experiment.shared import alike
from harness.model.build import count_parameters

_BF16, _FP32 = 2, 4  # bytes of a weight
_PACKED = {"nf4": 0.5, "int8": 1.0}  # of most weights of a language model; the others have more
_PARTITIONED = 3  # the ZeRO stage that spreads weights over the workers


def device_bytes(profile: Profile) -> int | None:
    """Memory of a GPU where trials run: what the profile says, else that of this machine's; None: not known."""
    if profile.device and profile.device.memory_gib:
        return round(profile.device.memory_gib * GIB)
    if profile.kind == "local" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def _element_bytes(spec: TrialSpec) -> float:
    """Of the language model, at least."""
    if spec.backbone.quantization in _PACKED:
        return _PACKED[spec.backbone.quantization]
    return _BF16 if spec.optimizer.bf16 or spec.backbone.dtype in ("bf16", "auto") else _FP32


def check_weights(specs: Sequence[TrialSpec], resources: Resources, holds: int | None, where: Cursor) -> None:
    """Check that the weights of every trial's model fit into a device's memory; ``harness plan`` looks at all of it.

    Args:
        specs: of the trials.
        resources: of each.
        holds: bytes of a device's memory; None: not known, so nothing is refused.
        where: location of the experiment.

    Raises:
        UserError: those of one do not.
    """
    if holds is None or resources.offload == "parameters":
        return
    workers = resources.workers if resources.zero_stage == _PARTITIONED else 1
    # The largest of a backbone: in fp32, where some are in bf16.
    by_model = {alike(spec, "task", "backbone", "adapter"): spec for spec in sorted(specs, key=_element_bytes)}
    for spec in by_model.values():
        counted = count_parameters(spec)
        rest = counted.total - counted.encoder - counted.language_model
        size = int(counted.language_model * _element_bytes(spec) + rest * (2 if spec.optimizer.bf16 else 4)) // workers
        if size > holds:
            raise UserError(
                f"{where / 'backbone' / 'language_model'}: {spec.backbone.language_model}: its weights alone take "
                f"{size / GIB:.3g} GiB of a device that has {holds / GIB:.3g} GiB; `harness plan` names what fits, "
                "such as resources: {zero_stage: 3, offload: parameters}, or more workers"
            )
