"""One pass of the language model for several models that share it and differ in their adapters and projectors.

The rows of a batch are repeated, one block for each model; a block gets the embeddings of its model, and each adapted
layer applies the model's own changes to it. Nothing in a language model mixes rows, so what a model computes is what
it computes alone, up to rounding.

Shapes: B rows of the batch, M models, R targets of all rows, T positions, D width, I and O features of a layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from adapters.placement.own_forward import OwnForward, is_taken_over
from harness.model.batch import Batch
from harness.model.build import shared_copy
from harness.model.context_model import ContextModel
from harness.model.past import Past

Turn = Callable[[], AbstractContextManager[None]]


class JointModel(ContextModel):
    """Scores a batch with several models at once.

    Args:
        language_model: without adapters; those of the models are its ``shared_copy``, with their adapters attached.

    Attributes:
        models: of the pass in progress.
        layers_draw: whether adapters draw random numbers too, as well as projectors.
    """

    chunked_loss = False

    def __init__(self, language_model: Any) -> None:
        nn.Module.__init__(self)
        self.language_model = shared_copy(language_model)
        self.router: Any = _Routers(self)
        self.models: Sequence[ContextModel] = ()
        self.layers_draw = False
        self._turns: Sequence[Turn] = ()
        self._rows: Batch | None = None  # of one model
        self._split: tuple[Tensor, Sequence[Tensor]] | None = None  # the last input of a layer, and its blocks
        self._known: list[ContextModel] = []  # of the last pass
        self._hooked: dict[str, list[nn.Module]] = {}  # path of a layer that is hooked → that of each model

    def score(self, batch: Batch, models: Sequence[ContextModel], turns: Sequence[Turn]) -> list[tuple[Tensor, Tensor]]:
        """Of each model what it returns for the batch, alone.

        Args:
            batch: on the models' device.
            models: that share the language model.
            turns: of each model, in which random numbers are drawn as it draws them alone.
        """
        self._attach(models)
        if self.training != models[0].training:
            self.train(models[0].training)
        self.models, self._turns, self._rows = models, turns, batch
        try:
            nll_R, tokens_R = self(batch.repeated(len(models)))
        finally:
            self.models, self._turns, self._rows, self._split = (), (), None, None
        return list(zip(nll_R.chunk(len(models)), tokens_R.chunk(len(models)), strict=True))

    def embed(self, batch: Batch) -> Tensor:
        """The embeddings of each model's block, (M × B, T, D)."""
        blocks = []
        for model, turn in zip(self.models, self._turns, strict=True):
            with turn():
                blocks.append(model.embed(self._own(batch)))
        return torch.cat(blocks)

    def _set_layout(self, batch: Batch, length: int, past: Past | None = None) -> None:
        for model in self.models:
            model._set_layout(self._own(batch), length, past)

    def _own(self, _repeated: Batch) -> Batch:
        assert self._rows is not None  # noqa: S101 - set by `score`
        return self._rows

    def _attach(self, models: Sequence[ContextModel]) -> None:
        """Hook the layers that some model's adapters hook, and take over what the engine has made of the buffers."""
        if len(models) == len(self._known) and all(map(operator.is_, models, self._known)):
            return
        self._known = list(models)
        own = dict(self.language_model.named_modules())
        theirs = [dict(model.language_model.named_modules()) for model in models]
        for path, module in own.items():
            modules = [named[path] for named in theirs]
            taken = any(is_taken_over(one) for one in modules)
            hooked = taken or any(one._forward_pre_hooks or one._forward_hooks for one in modules)
            if path and taken and not is_taken_over(module):
                OwnForward(module, _OwnForwards(self, path, module.forward))
            if path and hooked and path not in self._hooked:
                layers = _Blocks(self, path, {*module._forward_pre_hooks, *module._forward_hooks})
                module.register_forward_pre_hook(layers.before)
                module.register_forward_hook(layers.after)
                self._hooked[path] = modules
            elif path in self._hooked:
                self._hooked[path] = modules
            module._buffers.update(modules[0]._buffers)

    def blocks(self, x: Tensor) -> Sequence[Tensor]:
        """Each model's rows of the input of a layer; the same tensors for layers that read the same."""
        if self._split is None or self._split[0] is not x:
            self._split = x, x.chunk(len(self.models))
        return self._split[1]

    def layers(self, path: str) -> list[tuple[nn.Module, Turn]]:
        """A layer of each model of the pass in progress, and what its adapters run in."""
        turns = self._turns if self.layers_draw else [nullcontext] * len(self.models)
        return list(zip(self._hooked[path], turns, strict=True))


class _Routers:
    """Begins the pass of each model's router."""

    def __init__(self, joint: JointModel) -> None:
        self._joint = joint

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """A pass of each model of the pass in progress."""
        with ExitStack() as passes:
            for model in self._joint.models:
                passes.enter_context(model.router.one_pass())
            yield


class _OwnForwards:
    """The forward of each model's layer, which its adapters may have taken over, on the model's block of rows.

    Args:
        joint: the models.
        path: of the layer.
        plain: the layer's forward without adapters.
    """

    def __init__(self, joint: JointModel, path: str, plain: Callable[..., Tensor]) -> None:
        self._joint, self._path, self._plain = joint, path, plain

    def __call__(self, x: Tensor) -> Tensor:
        layers = self._joint.layers(self._path)
        if not any(is_taken_over(layer) for layer, _ in layers):
            return self._plain(x)
        blocks = []
        for (layer, turn), x_BTI in zip(layers, self._joint.blocks(x), strict=True):
            with turn():
                blocks.append(layer.forward(x_BTI))
        return torch.cat(blocks)


class _Blocks:
    """What the hooks of each model's layer do, on the model's block of rows.

    Args:
        joint: the models.
        path: of the layer.
        common: ids of the hooks that the language model has without adapters, and so do all copies of it.
    """

    def __init__(self, joint: JointModel, path: str, common: Collection[int]) -> None:
        self._joint, self._path, self._common = joint, path, common

    def _hooks(self, of: Mapping[int, Callable[..., Any]]) -> list[Callable[..., Any]]:
        return [hook for key, hook in of.items() if key not in self._common]

    def before(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        layers = self._joint.layers(self._path)
        if not any(self._hooks(layer._forward_pre_hooks) for layer, _ in layers):
            return args
        blocks = []
        for (layer, turn), x_BTI in zip(layers, args[0].chunk(len(layers)), strict=True):
            own: tuple[Any, ...] = (x_BTI, *args[1:])
            with turn():
                for hook in self._hooks(layer._forward_pre_hooks):
                    given = hook(layer, own)
                    own = own if given is None else given if isinstance(given, tuple) else (given,)
            blocks.append(own[0])
        return torch.cat(blocks), *args[1:]

    def after(self, _module: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
        layers = self._joint.layers(self._path)
        if not any(self._hooks(layer._forward_hooks) for layer, _ in layers):
            return y
        blocks = []
        for (layer, turn), x_BTI, y_BTO in zip(layers, args[0].chunk(len(layers)), y.chunk(len(layers)), strict=True):
            changed = y_BTO
            with turn():
                for hook in self._hooks(layer._forward_hooks):
                    given = hook(layer, (x_BTI, *args[1:]), changed)
                    changed = changed if given is None else given
            blocks.append(changed)
        return torch.cat(blocks)
