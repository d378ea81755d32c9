"""Any context-agnostic method of the PEFT library: ``{"method": "peft", "config": {"peft_type": "LOHA", "r": 4}}``.

PEFT replaces each layer that it adapts by a layer of its own. Here PEFT builds those layers, and the model gets its
original layers back immediately. Attaching makes a base layer's ``forward`` call PEFT's layer, which computes with a
twin of the base layer: same class, same parameters. Adapter parameters thus stay outside the model, as for all other
methods; the model keeps its modules, names and ``requires_grad``, and detaching removes that ``forward``.
https://huggingface.co/docs/peft (0.21)
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from pydantic import Field, TypeAdapter, ValidationError, field_validator
from torch import nn

from adapters import base
from adapters.placement.offload import device_of, dtype_of
from adapters.placement.router import Router
from harness.core.errors import UserError, did_you_mean

ADAPTER = "default"  # PEFT's default adapter name, which is part of its parameter names
BOOKKEEPING = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
# Options that change the base itself, or its structure, rather than adding layers to it.
_REFUSED = {
    "inference_mode": "it freezes the adapters",
    "layer_replication": "it adds layers to the base",
    "target_parameters": "it adapts parameters that are not layers",
}


def peft_library() -> Any:
    """The ``peft`` package, imported on first use.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UserError(f"this needs the peft library: pip install 'context-peft-harness[peft]' ({error})") from error


def config_keys(config_class: type) -> set[str]:
    """Option names of a PEFT config class, without the bookkeeping fields of its checkpoints."""
    return {field.name for field in dataclasses.fields(config_class) if field.init} - BOOKKEEPING


# Parts of the names of PEFT's parameters that are not the identity at zero: weight decay leaves them alone.
_NOT_ZERO = frozenset({"ia3_l", "ln_tuning_layers", "lora_magnitude_vector", "boft_s", "road_alpha", "osf_svd_params"})
_NOT_ZERO |= {"frod_lambda_l", "frod_lambda_s_values"}


class PeftBridgeConfig(base.Config):
    """Options. In an experiment file a list is an axis; use a pattern instead: ``target_modules: .*(q|v)_proj``."""

    # PEFT's own: peft_type, and the keys of its config class
    config: dict[str, Any] = Field(default_factory=lambda: {"peft_type": "LORA", "r": 8})

    @field_validator("config")
    @classmethod
    def _check(cls, config: dict[str, Any]) -> dict[str, Any]:
        try:
            make_config(config)
        except UserError as error:  # becomes a pydantic error, to which the caller adds file and key
            raise ValueError(str(error)) from None
        return config


def make_config(options: Mapping[str, Any]) -> Any:
    """PEFT's own config object.

    Raises:
        UserError: PEFT has no such method or the method no such option, a value is of the wrong type, or the method
            does something other than adding layers.
    """
    peft = peft_library()
    name = options.get("peft_type")
    usable = _usable(peft)
    if not isinstance(name, str):
        raise UserError(f"peft: config.peft_type must name one of PEFT's methods; {did_you_mean('', usable)}")
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
    if config_class is None:
        raise UserError(f"peft: unknown peft_type {name!r}; {did_you_mean(name.upper(), usable)}")
    if name not in usable:
        prompt = issubclass(config_class, peft.PromptLearningConfig)
        why = "it adds positions; use the method soft_prompt" if prompt else "it does more than add layers"
        raise UserError(f"peft: {name} cannot be used here: {why}; {did_you_mean(name, usable)}")
    options = {key: value for key, value in options.items() if key != "peft_type"}
    types = typing.get_type_hints(config_class)
    values = {key: _value(name, key, value, config_class, types) for key, value in options.items()}
    try:
        return config_class(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"peft: {name}: {error}") from error


def _value(method: str, key: str, value: Any, config_class: type, types: Mapping[str, Any]) -> Any:
    """One option, validated against the type that PEFT declares; PEFT itself does not check types."""
    if key in _REFUSED or (key == "bias" and value != "none"):
        why = _REFUSED.get(key, "it trains the base's own biases; use the method bitfit")
        raise UserError(f"peft: {method} with {key}={value!r} cannot be used here: {why}")
    allowed = config_keys(config_class) - set(_REFUSED)
    if key not in allowed:
        raise UserError(f"peft: {method} has no option {key!r}; {did_you_mean(key, allowed)}")
    try:
        return TypeAdapter(types[key]).validate_python(value)
    except ValidationError as error:
        raise UserError(f"peft: {method}: {key}={value!r}: {error.errors()[0]['msg']}") from None


def _usable(peft: Any) -> set[str]:
    """PEFT's methods that only add layers: no prompt, loss, schedule or routing."""
    tuner_base = importlib.import_module("peft.tuners.tuners_utils").BaseTuner
    return {
        kind.value
        for kind, tuner in peft.PEFT_TYPE_TO_TUNER_MAPPING.items()
        if issubclass(tuner, tuner_base) and tuner.forward is tuner_base.forward
    }


class PeftChange(base.ModelChange):
    """PEFT's layers, and what they share, kept outside the model.

    Parameters are named ``layers.<path>.<PEFT's name>``, or ``tuner.<PEFT's name>`` if all layers share them.
    """

    def __init__(self, language_model: nn.Module, config: Any, seed: int) -> None:
        super().__init__()
        paths = {module: path for path, module in language_model.named_modules()}
        on_meta = any(p.is_meta for p in language_model.parameters())
        with _readable_weights(language_model) if on_meta else nullcontext():
            tuner, replaced = _build(language_model, config, seed)
        del tuner.model
        of_base = {module: _twin(module) if module in replaced else module for module in paths}
        owned = set(tuner.modules())
        for layer in replaced.values():
            _keep_own(layer, owned, of_base)
            owned |= set(layer.modules())
        self.tuner = tuner
        self.layers = nn.ModuleDict({paths[old].replace(".", "/"): new for old, new in replaced.items()})
        if on_meta:
            self.to("meta")
        for path, module in self.named_modules():
            names = [name for name, _ in module.named_parameters(recurse=False)]
            module.undecayed = tuple(n for n in names if not _NOT_ZERO.isdisjoint([*path.split("."), n]))

    def attach(self, language_model: nn.Module) -> Callable[[], None]:
        """Replace every adapted layer's ``forward`` by PEFT's."""
        done: list[tuple[nn.Module, Any]] = []
        for key, layer in self.layers.items():
            adapted = language_model.get_submodule(key.replace("/", "."))
            done.append((adapted, vars(adapted).get("forward")))
            # Not the layer itself: assigning a module would register it as a submodule.
            adapted.forward = partial(_forward, adapted, layer)
        return partial(_restore_forward, done)

    def place(self, language_model: Any) -> None:
        """Put each of PEFT's layers on the device of its layer, and what they share where the model begins."""
        super().place(language_model)
        for key, layer in self.layers.items():
            adapted = language_model.get_submodule(key.replace("/", "."))
            layer.to(device_of(adapted), dtype_of(adapted))


def _forward(adapted: nn.Module, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``layer`` in the place of ``adapted``, whose mode it follows (dropout)."""
    if layer.training != adapted.training:
        layer.train(adapted.training)
    return layer(*args, **kwargs)


def _restore_forward(done: list[tuple[Any, Any]]) -> None:
    while done:
        adapted, forward = done.pop()
        del adapted.forward
        if forward is not None:
            adapted.forward = forward


def _build(language_model: nn.Module, config: Any, seed: int) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Let PEFT adapt the model, take PEFT's layers out, and restore the model.

    Returns:
        PEFT's tuner, and the model's original layer → PEFT's replacement.

    Raises:
        UserError: PEFT rejects the options for this model, changes its weights, or adapts more than layers.
    """
    peft = peft_library()
    name = config.peft_type.value
    changed: list[str] = []
    tuner_class = _watched(peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], changed)
    with _seeded(language_model, seed), _restored(language_model) as replaced:
        try:
            tuner = tuner_class(language_model, copy.deepcopy(config), ADAPTER)
            tuner._cast_adapter_dtype(ADAPTER, True)  # as peft.get_peft_model does: fp32 on a bf16 base
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # PEFT raises various exceptions for unsuitable models and options
            raise UserError(f"peft: {name} on this model: {type(error).__name__}: {error}") from error
    tuner.__class__ = peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]  # the subclass cannot be pickled
    if changed:
        raise UserError(
            f"peft: {name} with this initialisation changes the weights of the frozen base ({changed[0]} and others); "
            "allowed: one that does not (for LORA: init_lora_weights true, false, gaussian or orthogonal)"
        )
    tuner_layer = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    wrapper = importlib.import_module("peft.utils.other").AuxiliaryTrainingWrapper  # modules_to_save
    strange = sorted({type(new).__name__ for new in replaced.values() if not isinstance(new, tuner_layer | wrapper)})
    if strange or not replaced:
        raise UserError(f"peft: {name} does not adapt this model by PEFT layers, but by {strange or 'nothing'}")
    return tuner, replaced


def _watched(tuner_class: Any, changed: list[str]) -> Any:
    """A subclass of the tuner that detects and undoes changes to the weights of the layer that it adapts."""

    class Watched(tuner_class):  # type: ignore[misc]
        def _create_and_replace(self, config: Any, name: str, target: nn.Module, *args: Any, **kwargs: Any) -> None:
            own = dict(target.named_parameters())
            before = {key: p.detach().clone() for key, p in own.items() if not p.is_meta}
            super()._create_and_replace(config, name, target, *args, **kwargs)
            for key, old in before.items():
                if not torch.equal(own[key], old):
                    own[key].data = old
                    changed.append(kwargs.get("current_key", "") + "." + key)

    Watched.__name__ = tuner_class.__name__
    return Watched


@contextmanager
def _readable_weights(language_model: nn.Module) -> Iterator[None]:
    """Zeros as weights of a model on the meta device: some of PEFT's methods read the weights while they build.

    A single expanded number takes no memory.
    """
    own = {module: dict(module.named_parameters(recurse=False)) for module in language_model.modules()}
    with torch.device("cpu"):
        zeros = {
            p: nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), requires_grad=False)
            for p in language_model.parameters()
        }
        try:
            for module, parameters in own.items():
                for name, p in parameters.items():
                    setattr(module, name, zeros[p])
            yield
        finally:
            for module, parameters in own.items():
                for name, p in parameters.items():
                    setattr(module, name, p)


@contextmanager
def _seeded(language_model: nn.Module, seed: int) -> Iterator[None]:
    """Seed the global generators, from which PEFT draws, and restore their state afterwards."""
    devices = {p.device for p in language_model.parameters()}
    with torch.random.fork_rng(sorted(device.index or 0 for device in devices if device.type == "cuda")):
        torch.manual_seed(seed)
        yield


@contextmanager
def _restored(language_model: nn.Module) -> Iterator[dict[nn.Module, nn.Module]]:
    """Restore the model's modules, attributes and ``requires_grad`` on exit, even after an exception.

    Yields:
        A dict that is filled on exit: the model's layer → its replacement.
    """
    children = {module: dict(module.named_children()) for module in language_model.modules()}
    attributes = {module: set(vars(module)) for module in children}
    trained = {p: p.requires_grad for p in language_model.parameters()}
    replaced: dict[nn.Module, nn.Module] = {}
    try:
        yield replaced
    finally:
        for module, own in children.items():
            for name, child in own.items():
                now = getattr(module, name)
                if now is not child:
                    replaced[child] = now
                    setattr(module, name, child)
            for name in set(vars(module)) - attributes[module]:
                delattr(module, name)
        for p, requires_grad in trained.items():
            p.requires_grad_(requires_grad)


def _twin(layer: nn.Module) -> nn.Module:
    """A copy that shares all state with ``layer`` except hooks and a later ``forward``, which lead to the adapter."""
    twin: nn.Module = object.__new__(type(layer))
    nn.Module.__init__(twin)
    vars(twin).update({name: value for name, value in vars(layer).items() if "_hooks" not in name})
    return twin


def _keep_own(module: nn.Module, owned: set[nn.Module], of_base: Mapping[nn.Module, nn.Module]) -> None:
    """Turn submodules that belong to the base, or are registered elsewhere, into plain attributes.

    PEFT's code still finds them, but they are not counted, saved or moved twice.
    """

    def elsewhere(child: nn.Module) -> bool:
        inside = list(child.children())
        empty = not [*child.parameters(recurse=False), *child.buffers(recurse=False)]
        return child in owned or child in of_base or (empty and bool(inside) and all(map(elsewhere, inside)))

    for name, child in list(module.named_children()):
        if elsewhere(child):
            delattr(module, name)
            vars(module)[name] = of_base.get(child, child)
        else:
            _keep_own(child, owned, of_base)


class PeftBridge(base.AdapterMethod):
    """A method of the peft library, applied to all tokens.

    Most of PEFT's initialisations are the identity; with another one (``init_lora_weights: false``, or FOURIERFT by
    default) training does not start from the base model's function.
    """

    summary = "any context-agnostic method of the peft library, by PEFT's own config"
    grouped = False
    Config = PeftBridgeConfig
    config: PeftBridgeConfig

    def label(self) -> str:
        """``peft LORA r=8``."""
        config = make_config(self.config.config)
        rank = getattr(config, "r", None)
        return f"peft {config.peft_type.value}" + (f" r={rank}" if rank else "")

    @property
    def name(self) -> str:
        """``peft``."""
        return "peft"

    def model_change(
        self,
        language_model: nn.Module,
        groups: Sequence[str],
        router: Router,
        shared: nn.Module | None,
        generator: torch.Generator,
    ) -> base.ModelChange:
        """PEFT's layers for this model."""
        seed = int(torch.randint(2**31, (), generator=generator, device="cpu"))
        return PeftChange(language_model, make_config(self.config.config), seed)
