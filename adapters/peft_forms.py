"""Which of our methods have a form in the peft library, and what their options and tensors are there.

Shapes: I and O input and output features of a layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.base import AdapterMethod
from adapters.dora import DoRA
from adapters.ia3 import IA3
from adapters.lora import LoRA, LoRADelta
from adapters.roles import ATTENTION, FEED_FORWARD, Target
from adapters.vera import VeRA
from harness.errors import UserError


class Form:
    """One of our methods as PEFT has it."""

    method: ClassVar[str]
    peft_type: ClassVar[str]
    options: ClassVar[Mapping[str, str]] = {}  # ours → PEFT's
    tensors: ClassVar[Mapping[str, str]]  # a delta's parameter → its name in the checkpoint, behind the layer's path
    shared: ClassVar[tuple[str, ...]] = ()  # buffers of all layers together
    fixed: ClassVar[Mapping[str, Any]] = {}  # PEFT's options that say that it is this method
    roles: ClassVar[frozenset[str]] = ATTENTION | FEED_FORWARD

    def peft_options(self, config: Any) -> dict[str, Any]:
        """Of our options PEFT's."""
        return {**self.fixed, **{theirs: getattr(config, ours) for ours, theirs in self.options.items()}}

    def our_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of PEFT's options ours. What is 0 or false there is so by default here."""
        return {ours: options[theirs] for ours, theirs in self.options.items() if options.get(theirs)}

    def saved(self, target: Target, delta: nn.Module, _so_far: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One layer's tensors, by their names behind its path.

        Args:
            target: the layer, or a part of a fused one.
            delta: our parameters for it.
            _so_far: what other parts of the same layer gave.

        Raises:
            UserError: PEFT cannot adapt a part of a layer so.
        """
        if target.rows is not None:
            raise UserError(
                f"export_peft: {self.method} acts on the {target.role} part of the fused layer {target.path}, "
                "which has no form in the peft library; allowed: all parts of it"
            )
        return {theirs: delta.get_parameter(ours).detach() for ours, theirs in self.tensors.items()}

    def fill(self, target: Target, delta: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """The reverse of ``saved``: take one layer's tensors."""
        for ours, theirs in self.tensors.items():
            delta.get_parameter(ours).copy_(saved[theirs])

    def which_layers(self, names: Mapping[str, str], targets: Sequence[Target]) -> dict[str, list[str]]:
        """PEFT's options that say which layers.

        Args:
            names: path → what PEFT shall call it.
            targets: the layers, or parts of fused ones.
        """
        return {"target_modules": sorted(set(names.values()))}

    def check_layer(self, targets: Sequence[Target], layer: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """See that a layer of a checkpoint does no more than ours can.

        Args:
            targets: what we make of the layer: one, or parts of a fused one.
            layer: PEFT's, built from the checkpoint's config.
            saved: its tensors.

        Raises:
            UserError: it does something else.
        """


class LoRAForm(Form):
    """A pair that starts from W (PiSSA, OLoRA) is exported as all that it adds: a pair of twice the rank."""

    method, peft_type = "lora", "LORA"
    options: ClassVar = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "use_rslora": "use_rslora"}
    tensors: ClassVar = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    fixed: ClassVar = {"use_dora": False}

    def peft_options(self, config: Any) -> dict[str, Any]:
        """With the alpha that gives our scale."""
        options = super().peft_options(config)
        options["r"] = rank = config.rank * (2 if config.starts_from_weight else 1)
        default = config.rank if config.alpha is None else config.alpha
        alpha = config.scale * (math.sqrt(rank) if config.use_rslora else rank) if rank != config.rank else default
        return {**options, "lora_alpha": _whole(alpha)}

    def our_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Alpha is a float here."""
        return {**super().our_options(options), "alpha": float(options["lora_alpha"])}

    def saved(self, target: Target, delta: nn.Module, _so_far: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pair that is added."""
        super().saved(target, delta, _so_far)
        assert isinstance(delta, LoRADelta)  # noqa: S101 - for the type checker
        return {name: x.detach() for name, x in zip(self.tensors.values(), delta.factors(), strict=True)}


class DoRAForm(Form):
    """LoRA's pair and a magnitude."""

    method, peft_type = "dora", "LORA"
    options: ClassVar = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    tensors: ClassVar = {**LoRAForm.tensors, "lora_magnitude_vector": "lora_magnitude_vector"}
    fixed: ClassVar = {"use_dora": True}

    def peft_options(self, config: Any) -> dict[str, Any]:
        """Alpha written out."""
        alpha = _whole(config.rank if config.alpha is None else config.alpha)
        return {**super().peft_options(config), "lora_alpha": alpha}

    def our_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """There is no rsLoRA here: the same scale by alpha."""
        factor = math.sqrt(options["r"]) if options.get("use_rslora") else 1.0
        if options.get("lora_dropout"):
            warnings.warn(
                "import_peft: dropout of DoRA acts on the low-rank path alone here, in PEFT on the input of W too: "
                "further training differs, what is computed without dropout does not",
                stacklevel=2,
            )
        return {**super().our_options(options), "alpha": float(options["lora_alpha"]) * factor}


class VeRAForm(Form):
    """Two vectors for each layer, two projections for all."""

    method, peft_type = "vera", "VERA"
    options: ClassVar = {"rank": "r", "d_initial": "d_initial", "dropout": "vera_dropout"}
    tensors: ClassVar = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
    shared = ("vera_A", "vera_B")
    fixed: ClassVar = {"save_projection": True}


class IA3Form(Form):
    """A vector: in PEFT a column over the outputs, of the down projection a row over the inputs."""

    method, peft_type = "ia3", "IA3"
    tensors: ClassVar = {"ia3_l": "ia3_l"}
    roles = frozenset({"k", "v", "down"})

    def saved(self, target: Target, delta: nn.Module, _so_far: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ones at the parts of a fused layer that have no vector."""
        vector = delta.get_parameter("ia3_l").detach()
        if target.rows is None:
            return {"ia3_l": vector[None] if target.role == "down" else vector[:, None]}
        layer: Any = target.layer
        outputs = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        whole_O1 = _so_far.get("ia3_l", vector.new_ones(int(outputs), 1))
        return {"ia3_l": whole_O1.index_copy(0, torch.as_tensor(target.rows, device=vector.device), vector[:, None])}

    def fill(self, target: Target, delta: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """Its own outputs' part."""
        vector = saved["ia3_l"].flatten()
        delta.get_parameter("ia3_l").copy_(vector if target.rows is None else vector[list(target.rows)])

    def which_layers(self, names: Mapping[str, str], targets: Sequence[Target]) -> dict[str, list[str]]:
        """And of which of them the input is scaled."""
        inside = sorted({names[target.path] for target in targets if target.role == "down"})
        return {**super().which_layers(names, targets), "feedforward_modules": inside}

    def check_layer(self, targets: Sequence[Target], layer: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """The right side is scaled, and of a fused layer nothing but k and v."""
        path, inside, vector = targets[0].path, bool(layer.is_feedforward), saved["ia3_l"].flatten()
        if inside != (targets[0].role == "down"):
            raise UserError(
                "import_peft: feedforward_modules: IA3 here scales the input of down and the output of k and v; "
                f"found the {'input' if inside else 'output'} of {path}"
            )
        ours = {row for target in targets for row in target.rows or range(len(vector))}
        if any(value != 1 for row, value in enumerate(vector.tolist()) if row not in ours):
            raise UserError(f"import_peft: {path}: found a scale on the queries; IA3 here scales k, v and down")


def _whole(alpha: float) -> float:
    """PEFT declares alpha as an integer, and takes others."""
    return int(alpha) if float(alpha).is_integer() else alpha


FORMS: dict[type[AdapterMethod], Form] = {LoRA: LoRAForm(), DoRA: DoRAForm(), IA3: IA3Form(), VeRA: VeRAForm()}
