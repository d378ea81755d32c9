"""Linear layers whose frozen weight is packed in 4 or 8 bits, as bitsandbytes quantises it.

- ``NF4Linear``: 4 bits a weight in blocks of 64, whose scales have 8 bits in blocks of 256 (QLoRA, Dettmers et al.
  2023, arXiv 2305.14314, section 3: NF4 and double quantisation).
- ``Int8Linear``: 8 bits a weight, with one scale for each output (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339).

bitsandbytes quantises and unpacks; the products are computed here, with the unpacked weight in the input's dtype, in
training as in evaluation. Its own layers would not do: where a CPU has AVX512-BF16, its 4-bit layer rewrites its weight
in the first evaluation, and has no gradient afterwards (0.50.2: silently zero); its 8-bit layer rounds activations to 8
bits, on a CPU in evaluation only, and by outliers of the whole batch, so that an example's scores would depend on those
beside it.

All that a layer holds are a parameter and buffers, so it is moved, copied and counted like any other. Scales are kept
as the bits of their numbers, which no cast of the model to another dtype changes.

Shapes: B rows, T positions, I and O input and output features, N weights, K blocks, L blocks of blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_BLOCK, _BLOCK_OF_SCALES = 64, 256  # numbers that share a scale
_CODE = 256  # numbers that scales are rounded to
_UNPACKED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes in which bitsandbytes unpacks
_LARGEST = 127.0  # of an 8-bit weight


class PackedLinear(nn.Module, ABC):
    """A linear layer with a frozen weight in packed form.

    Args:
        in_features, out_features: of the layer.
        bias: of the layer, frozen and not packed.
    """

    weight: nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @abstractmethod
    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) that the packed form stands for."""

    @property
    def weights(self) -> int:
        """Number of weights, however they are packed."""
        return self.in_features * self.out_features

    @property
    def scale_bytes(self) -> int:
        """Bytes of what unpacking needs besides the packed weight."""
        return sum(x.nbytes for x in self.buffers())

    def forward(self, x_BTI: Tensor) -> Tensor:
        """``W x + b``."""
        y_BTO: Tensor = _Product.apply(x_BTI, self)  # type: ignore[no-untyped-call]
        return y_BTO if self.bias is None else y_BTO + self.bias

    def extra_repr(self) -> str:
        """The features."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """``W x``, for whose backward the weight is unpacked again: nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x_BTI, layer.unpacked(x_BTI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BTO: Tensor) -> tuple[Tensor, None]:
        return g_BTO @ ctx.layer.unpacked(g_BTO.dtype), None


class NF4Linear(PackedLinear):
    """4 bits a weight.

    Args:
        in_features, out_features, bias: of the layer.
        packed_N1: two weights a byte.
        scales_K: of the blocks, 8 bits each.
        scales_L: of the blocks of scales, in fp32.
        code: the 256 numbers that scales are rounded to, in fp32.
        offset: that was subtracted from scales, in fp32.
    """

    scales_K: Tensor
    scale_bits_L: Tensor
    code_bits: Tensor
    offset_bits: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None,
        packed_N1: Tensor, scales_K: Tensor, scales_L: Tensor, code: Tensor, offset: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.weight = nn.Parameter(packed_N1, requires_grad=False)
        self.register_buffer("scales_K", scales_K)
        self.register_buffer("scale_bits_L", scales_L.view(torch.int32))
        self.register_buffer("code_bits", code.view(torch.int32))
        self.register_buffer("offset_bits", offset.view(torch.int32))

    @classmethod
    def of(cls, layer: Any) -> NF4Linear:
        """What bitsandbytes' ``Linear4bit`` has quantised."""
        state = layer.weight.quant_state
        scales = state.state2.absmax, state.state2.code, state.offset
        return cls(layer.in_features, layer.out_features, layer.bias, layer.weight.data, state.absmax, *scales)

    @classmethod
    def empty(cls, in_features: int, out_features: int, bias: Tensor | None, device: torch.device) -> NF4Linear:
        """Without values."""
        packed, blocks = -(-in_features * out_features // 2), -(-in_features * out_features // _BLOCK)
        packed_N1 = torch.empty(packed, 1, dtype=torch.uint8, device=device)
        scales_K = torch.empty(blocks, dtype=torch.uint8, device=device)
        scales_L = torch.empty(-(-blocks // _BLOCK_OF_SCALES), device=device)
        code, offset = torch.empty(_CODE, device=device), torch.empty((), device=device)
        return cls(in_features, out_features, bias, packed_N1, scales_K, scales_L, code, offset)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I)."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        of_scales = QuantState(
            absmax=self.scale_bits_L.view(torch.float32),
            code=self.code_bits.view(torch.float32),
            blocksize=_BLOCK_OF_SCALES,
            dtype=torch.float32,
        )
        state = QuantState(
            absmax=self.scales_K,
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=dtype if dtype in _UNPACKED else torch.float32,
            offset=self.offset_bits.view(torch.float32),
            state2=of_scales,
        )
        weight_OI: Tensor = dequantize_4bit(self.weight.data, state)
        return weight_OI.to(dtype)


class Int8Linear(PackedLinear):
    """8 bits a weight.

    Args:
        in_features, out_features, bias: of the layer.
        weight_OI: as integers from -127 to 127.
        scales_O: what 127 stands for, in fp32.
    """

    scale_bits_O: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None, weight_OI: Tensor, scales_O: Tensor
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.register_buffer("scale_bits_O", scales_O.view(torch.int32))

    @classmethod
    def of(cls, layer: Any) -> Int8Linear:
        """What bitsandbytes' ``Linear8bitLt`` has quantised."""
        return cls(layer.in_features, layer.out_features, layer.bias, layer.weight.data, layer.weight.SCB.float())

    @classmethod
    def empty(cls, in_features: int, out_features: int, bias: Tensor | None, device: torch.device) -> Int8Linear:
        """Without values."""
        weight_OI = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        return cls(in_features, out_features, bias, weight_OI, torch.empty(out_features, device=device))

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I)."""
        exact = torch.promote_types(dtype, torch.float32)
        scales_O1 = self.scale_bits_O.view(torch.float32)[:, None] / _LARGEST
        return self.weight.to(exact).mul_(scales_O1).to(dtype)


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    """The layers of a model whose weights are packed."""
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def count(model: nn.Module) -> int:
    """Number of a model's parameters: of packed weights the number of weights; tied ones count once."""
    packed = {id(layer.weight): layer.weights for layer in packed_layers(model)}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


def scale_bytes(model: nn.Module) -> int:
    """Bytes of what unpacking all packed weights needs besides the weights."""
    return sum(layer.scale_bytes for layer in packed_layers(model))
