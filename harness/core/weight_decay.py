"""Weight decay that leaves alone what it would pull away from the identity.

Decay pulls a parameter to zero. For most adapters zero is the identity; for a vector that multiplies (IA3, LN-tuning,
DoRA's magnitudes) it is the opposite, and a group without tokens would leave the identity. A module names such
parameters in ``undecayed``, a tuple of its own parameters' names. Imports nothing, not torch either.
"""

from __future__ import annotations

from typing import Any


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of a torch optimizer: ``AdamW(harness.parameter_groups(model, 0.1), lr=1e-3)``.

    Args:
        model: an adapted model, or a module that contains one.
        weight_decay: of all trainable parameters but those that adapters exempt: vectors that multiply (IA3, LN-tuning,
            DoRA), and matrices that start from the layer's weight (PiSSA, OLoRA).

    Returns:
        One or two groups, of the parameters with ``requires_grad``.
    """
    exempt = {
        id(p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if name in getattr(module, "undecayed", ())
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
