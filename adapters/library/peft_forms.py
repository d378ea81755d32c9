"""Our methods that have an equivalent in the peft library, with its options and tensor names.

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
from adapters.methods.dora import DoRA
from adapters.methods.ia3 import IA3, Scale
from adapters.methods.lora import LoRA, LoRADelta
from adapters.methods.vera import VeRA
from adapters.placement.roles import ATTENTION, FEED_FORWARD, Target
from harness.core.errors import UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of a layer's tensors: PEFT's model wraps its tuner, and the tuner wraps the base


class Form:
    """How one of our methods is expressed in PEFT."""

    method: ClassVar[str]
    peft_type: ClassVar[str]
    options: ClassVar[Mapping[str, str]] = {}  # ours → PEFT's
    tensors: ClassVar[Mapping[str, str]]  # a delta's parameter → its name in the checkpoint, after the layer's path
    shared: ClassVar[tuple[str, ...]] = ()  # buffers shared by all layers
    fixed: ClassVar[Mapping[str, Any]] = {}  # values of PEFT's options that select this method
    # PEFT's options that give no shape, with a value of the type that it declares; it computes with any number.
    any_scale: ClassVar[Mapping[str, Any]] = {}
    roles: ClassVar[frozenset[str]] = ATTENTION | FEED_FORWARD
    two_are_one = False  # whether two stacked groups are one checkpoint together

    def peft_options(self, config: Any, stacked: bool = False) -> dict[str, Any]:
        """PEFT's options for our config; ``stacked``: of a group together with the one that all tokens share."""
        return {**self.fixed, **{theirs: getattr(config, ours) for ours, theirs in self.options.items()}}

    def our_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Our options for PEFT's. Options that are 0 or false in PEFT are left at our default, which is the same."""
        return {ours: options[theirs] for ours, theirs in self.options.items() if options.get(theirs)}

    def saved(self, target: Target, delta: nn.Module, _so_far: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One layer's tensors for the checkpoint: name after the layer's path → tensor.

        Args:
            target: the layer, or one role's part of a fused layer.
            delta: our parameters for it.
            _so_far: the tensors of the same layer's other parts.

        Raises:
            UserError: PEFT cannot adapt a part of a layer with this method.
        """
        if getattr(delta, "below", ()) and not self.two_are_one:
            raise UserError(
                f"export_peft: {self.method}: two stacked groups act on these tokens, which have no equivalent in one "
                "checkpoint of the peft library; allowed: the shared group alone, or another method: lora, ia3"
            )
        if target.rows is not None:
            raise UserError(
                f"export_peft: {self.method} acts on the {target.role} part of the fused layer {target.path}, "
                "which has no equivalent in the peft library; allowed: all parts of the layer"
            )
        return {theirs: delta.get_parameter(ours).detach() for ours, theirs in self.tensors.items()}

    def fill(self, target: Target, delta: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """The inverse of ``saved``: set our parameters from one layer's tensors."""
        for ours, theirs in self.tensors.items():
            delta.get_parameter(ours).copy_(saved[theirs])

    def which_layers(self, names: Mapping[str, str], targets: Sequence[Target]) -> dict[str, list[str]]:
        """PEFT's options that select the layers.

        Args:
            names: layer path → the name by which PEFT finds it.
            targets: the layers, or parts of fused layers.
        """
        return {"target_modules": sorted(set(names.values()))}

    def check_layer(self, targets: Sequence[Target], layer: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """Check that our method can represent a checkpoint's layer.

        Args:
            targets: our targets in the layer: one, or parts of a fused layer.
            layer: PEFT's layer, built from the checkpoint's config.
            saved: the layer's tensors.

        Raises:
            UserError: it cannot.
        """


class LoRAForm(Form):
    """LoRA. A pair initialised from W (PiSSA, OLoRA) is exported as what it adds: a pair of twice the rank.

    So are two stacked groups: ``B A + B' A'`` is one pair, [B B'] [A; A'].
    """

    method, peft_type = "lora", "LORA"
    options: ClassVar = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "use_rslora": "use_rslora"}
    tensors: ClassVar = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    fixed: ClassVar = {"use_dora": False}
    any_scale: ClassVar = {"lora_alpha": 1}
    two_are_one = True

    def peft_options(self, config: Any, stacked: bool = False) -> dict[str, Any]:
        """Includes the alpha that gives our scale."""
        options = super().peft_options(config)
        options["r"] = rank = config.rank * (2 if config.starts_from_weight else 1) * (2 if stacked else 1)
        default = config.rank if config.alpha is None else config.alpha
        alpha = config.scale * (math.sqrt(rank) if config.use_rslora else rank) if rank != config.rank else default
        return {**options, "lora_alpha": _whole(alpha)}

    def our_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Alpha is a float here."""
        return {**super().our_options(options), "alpha": _number(options, "lora_alpha")}

    def saved(self, target: Target, delta: nn.Module, _so_far: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The low-rank pair that is added."""
        super().saved(target, delta, _so_far)
        assert isinstance(delta, LoRADelta)  # noqa: S101 - for the type checker
        return {name: x.detach() for name, x in zip(self.tensors.values(), delta.factors(), strict=True)}


class DoRAForm(Form):
    """DoRA: LoRA's pair and a magnitude vector."""

    method, peft_type = "dora", "LORA"
    options: ClassVar = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    tensors: ClassVar = {**LoRAForm.tensors, "lora_magnitude_vector": "lora_magnitude_vector"}
    fixed: ClassVar = {"use_dora": True}
    any_scale: ClassVar = {"lora_alpha": 1}

    def peft_options(self, config: Any, stacked: bool = False) -> dict[str, Any]:
        """Alpha is explicit in PEFT."""
        alpha = _whole(config.rank if config.alpha is None else config.alpha)
        return {**super().peft_options(config), "lora_alpha": alpha}

    def our_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Our DoRA has no rsLoRA option: alpha gives the same scale."""
        factor = math.sqrt(options["r"]) if options.get("use_rslora") else 1.0
        if options.get("lora_dropout"):
            warnings.warn(
                "import_peft: DoRA's dropout acts on the low-rank path only; in PEFT it also acts on the input of W: "
                "further training differs, evaluation does not",
                stacklevel=2,
            )
        return {**super().our_options(options), "alpha": _number(options, "lora_alpha") * factor}


class VeRAForm(Form):
    """VeRA: two vectors per layer, two projections shared by all layers."""

    method, peft_type = "vera", "VERA"
    options: ClassVar = {"rank": "r", "d_initial": "d_initial", "dropout": "vera_dropout"}
    tensors: ClassVar = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
    shared = ("vera_A", "vera_B")
    fixed: ClassVar = {"save_projection": True}


class IA3Form(Form):
    """IA3: one vector; in PEFT a column (O, 1) over the outputs, or a row (1, I) over the inputs of down."""

    method, peft_type = "ia3", "IA3"
    tensors: ClassVar = {"ia3_l": "ia3_l"}
    roles = frozenset({"k", "v", "down"})
    two_are_one = True

    def saved(self, target: Target, delta: nn.Module, _so_far: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The vector, with ones for the parts of a fused layer that are not scaled; of stacked groups the product."""
        assert isinstance(delta, Scale)  # noqa: S101 - for the type checker
        vector = delta.vector("ia3_l").detach()
        if target.rows is None:
            return {"ia3_l": vector[None] if target.role == "down" else vector[:, None]}
        layer: Any = target.layer
        outputs = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        whole_O1 = _so_far.get("ia3_l", vector.new_ones(int(outputs), 1))
        return {"ia3_l": whole_O1.index_copy(0, torch.as_tensor(target.rows, device=vector.device), vector[:, None])}

    def fill(self, target: Target, delta: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """The part of the vector that belongs to the target's outputs."""
        vector = saved["ia3_l"].flatten()
        delta.get_parameter("ia3_l").copy_(vector if target.rows is None else vector[list(target.rows)])

    def which_layers(self, names: Mapping[str, str], targets: Sequence[Target]) -> dict[str, list[str]]:
        """Also selects the layers whose input is scaled."""
        inside = sorted({names[target.path] for target in targets if target.role == "down"})
        return {**super().which_layers(names, targets), "feedforward_modules": inside}

    def check_layer(self, targets: Sequence[Target], layer: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """Check that the expected side is scaled, and only k and v of a fused layer."""
        path, inside, vector = targets[0].path, bool(layer.is_feedforward), saved["ia3_l"].flatten()
        if inside != (targets[0].role == "down"):
            raise UserError(
                "import_peft: feedforward_modules: allowed: the input of down, the output of k and v; "
                f"found the {'input' if inside else 'output'} of {path}"
            )
        ours = {row for target in targets for row in target.rows or range(len(vector))}
        if any(value != 1 for row, value in enumerate(vector.tolist()) if row not in ours):
            raise UserError(f"import_peft: {path}: found a scale on the queries; allowed: on k, v and down")


def _whole(alpha: float) -> float:
    """An int if possible: PEFT declares alpha as an integer but accepts floats."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _number(options: Mapping[str, Any], key: str) -> float:
    """The value of an option of which PEFT checks no type.

    Raises:
        UserError: it is not a finite number.
    """
    value = options[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"import_peft: {key}: found {value!r}; allowed: a number")
    return float(value)


FORMS: dict[type[AdapterMethod], Form] = {LoRA: LoRAForm(), DoRA: DoRAForm(), IA3: IA3Form(), VeRA: VeRAForm()}
