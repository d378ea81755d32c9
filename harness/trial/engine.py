"""Wraps DeepSpeed: training steps, weights and checkpoints of one trial. The only module that imports deepspeed.

A single process needs no port and no launcher; several processes of a trial, its workers, call ``join_process_group``
with a store. DeepSpeed's just-in-time builds are avoided, so no compiler is needed.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import pickle
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, Store

from harness.core.files import atomic
from harness.core.record import Memory
from harness.core.weight_decay import parameter_groups
from harness.experiment.sections import Optimizer
from harness.model.packed import scale_bytes
from harness.model.workers import joined
from harness.trial.measure import PeakMemory
from harness.trial.short_step import reading, shorten

PRESETS = Path(__file__).parent.parent.parent / "clusters" / "deepspeed"
PARTITIONED_STAGE = 3  # the parameters are spread over the workers, and gathered layer by layer in every pass
_GRADIENTS_STAGE = 2  # from this stage on, gradients are spread too
_LOOPBACK = "127.0.0.1"
_NAMES_FILE = "trainable.json"
_FROZEN_FILE = "frozen.safetensors"  # parameters that other stages of the trial train, but this one does not


def _import_deepspeed() -> Any:
    """Import DeepSpeed without its logging, and disable its shared-memory op (inference only; building takes 27 s)."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Of functions that DeepSpeed calls, in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    return deepspeed


def join_process_group(
    store: Store | None = None, rank: int = 0, world_size: int = 1, address: str | None = None
) -> None:
    """Initialise the process group of the trial, once per process: DeepSpeed cannot leave a group and join another.

    Args:
        store: for the rendezvous of the processes (a ``FileStore`` needs no port); None: a group of one process.
        rank: of this process.
        world_size: number of processes.
        address: IP address of this node, at which the others reach it; None: gloo looks up the name of the host, which
            on some nodes is the loopback. A group of one process listens on the loopback alone.
    """
    if not torch.distributed.is_initialized():
        if store is None:
            address = _LOOPBACK
        if address is not None:
            for interface in _interfaces(address):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
                if address == _LOOPBACK:
                    os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=store or HashStore(), rank=rank, world_size=world_size)


def _interfaces(address: str) -> Iterator[str]:
    """The network interfaces with this IP address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            yield name


def import_libraries() -> None:
    """Import the libraries that a trial needs."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, get_scheduler  # noqa: F401

    _import_deepspeed()


@cache
def prepare_process() -> None:
    """Prepare for trials: libraries are imported now, so that their memory is not attributed to the first trial."""
    import_libraries()
    join_process_group()
    # The libraries' objects stay: looking through them all takes half a second, at the start of every trial.
    gc.collect()
    gc.freeze()


class _FixedGradientOrder(torch.autograd.Function):
    """A zero that depends on parameters and is added to the loss, so that all gradients come in a fixed order.

    It is created before the forward pass, so its backward runs last: then every parameter has a gradient, possibly
    zero, and DeepSpeed gets them in the same order in every process. ZeRO-2 reduces gradients across processes by their
    order of arrival, so a different order silently gives wrong gradients.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(p) for p in ctx.saved_tensors)


class _Given(torch.autograd.Function):
    """A loss of 0 whose backward gives parameters gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if gradient is None else gradient * scale for gradient in ctx.gradients)


class Engine:
    """Forward, backward and optimizer step of one model, and its checkpoints.

    Args:
        model: returns (nll_B, tokens_B) when called with a batch; its trainable parameters have ``requires_grad``.
        options: optimizer and schedule.
        total_steps: optimizer steps that this engine will take, for the schedule.
        zero_stage: preset ``clusters/deepspeed/zero<stage>.json``.
        keeps: names of the parameters that ``save_weights`` writes and ``load_weights`` reads; None: the trainable
            ones. A trial with several stages keeps the parameters that any stage trains.
        units: modules in which the executed submodules depend on a process's batch: adapters. ZeRO-3 gathers and
            reduces each as a unit, because all processes must do this in the same order.
        offload: preset ``clusters/deepspeed/offload_<offload>.json``, or ``none``.
        fused: one operation for all parameters in the optimizer, and, where this is the only process and ZeRO is off,
            none of what a step does for several. Differs by rounding only.

    Attributes:
        asks: numbers of this worker that travel with the loss of a step, so that they cost no exchange of their own.
        asked: their sums over the workers, of the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Optimizer,
        total_steps: int,
        zero_stage: int,
        keeps: Collection[str] | None = None,
        units: Iterable[nn.Module] = (),
        offload: str = "none",
        fused: bool = True,
    ) -> None:
        from transformers import get_scheduler

        assert options.learning_rate is not None  # noqa: S101 - the plan resolves it
        deepspeed = _import_deepspeed()
        join_process_group()
        self.workers = joined()
        self.asks: tuple[float, ...] = ()
        self.asked: tuple[float, ...] = ()
        self.model, self.options, self.zero_stage = model, options, zero_stage
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kept = self._trainable if keeps is None else keeps
        self._kept = {name: p for name, p in model.named_parameters() if name in kept}
        # A torch optimizer, because DeepSpeed compiles its own on first use.
        optimizer = torch.optim.AdamW(
            parameter_groups(model, options.weight_decay) if options.weight_decay else self._trainable.values(),
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            weight_decay=options.weight_decay,
            fused=fused,
        )
        warmup_steps = round(options.warmup_ratio * total_steps)
        scheduler = get_scheduler(options.lr_scheduler_type, optimizer, warmup_steps, total_steps)
        units = list(units)
        for module in units:
            deepspeed.utils.set_z3_leaf_module(module, True)
        several = bool(units) and self.workers.count > 1 and zero_stage < PARTITIONED_STAGE
        self._ordered = list(self._trainable.values()) if several else []
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(options, zero_stage, offload),
            dist_init_required=False,
        )
        self._engine.checkpoint_engine.load = _load_data
        self._optimizer = optimizer
        if fused and self.workers.count == 1 and zero_stage == 0 and not options.bf16:
            shorten(self._engine, tuple(self._trainable.values()), options.max_grad_norm)
        # ZeRO-3 partitions parameters, so they are gathered before they are read or written.
        self._gather = deepspeed.zero.GatheredParameters if zero_stage == PARTITIONED_STAGE else None

    def train_step(self, batch: Any) -> float:
        """Forward and backward pass on the mean NLL per target token; optimizer step at accumulation boundaries.

        Args:
            batch: this worker's share of the trial's batch. The loss and its gradients are those of the whole batch:
                the mean over the target tokens of all workers, however many each has.

        Returns:
            The loss in nats per token.

        Raises:
            FloatingPointError: the loss is not finite, on all workers alike; the weights are unchanged.
        """
        zero = _FixedGradientOrder.apply(*self._ordered) if self._ordered else None  # type: ignore[no-untyped-call]
        nll_B, tokens_B = self._engine(batch)
        loss: Tensor
        if self.workers.count == 1:
            loss = nll_B.sum() / tokens_B.sum()
            read, self.asked = reading(loss), self.asks
        else:
            own: list[float] = torch.stack([nll_B.sum().double(), tokens_B.sum().double()]).tolist()  # one read
            nll, tokens, *asked = self.workers.total(*own, *self.asks)
            self.asked = tuple(asked)
            loss = nll_B.sum() * (self.workers.count / tokens)  # DeepSpeed takes the mean of the workers' gradients
            check_finite(nll / tokens)  # before a backward pass, in which the workers exchange
            read = partial(float, nll / tokens)
        self._engine.backward(loss if zero is None else loss + zero)
        value = read()
        check_finite(value)
        self._engine.step()
        return value

    def step_with(self, gradients: Sequence[Tensor | None]) -> None:
        """Take an optimizer step with the gradients of a loss that were computed elsewhere; for one worker.

        Args:
            gradients: of the ``trainable`` parameters, in order; None: the loss does not depend on one.
        """
        loss: Tensor = _Given.apply(gradients, *self.trainable)  # type: ignore[no-untyped-call]
        self._engine.backward(loss)
        self._engine.step()

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that it trains."""
        return list(self._trainable.values())

    @property
    def steps(self) -> int:
        """Number of optimizer steps taken, including those before a resume."""
        return int(self._engine.global_steps)

    @property
    def accumulating(self) -> bool:
        """Whether there are accumulated gradients since the last step; a checkpoint would lose them."""
        return bool(self._engine.micro_steps % self.options.gradient_accumulation_steps)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._engine.get_lr()[0])

    def _gathered(self, parameters: Mapping[str, nn.Parameter], write: bool = False) -> AbstractContextManager[Any]:
        if self._gather is None or not parameters:
            return nullcontext()
        context: AbstractContextManager[Any] = self._gather(
            list(parameters.values()), modifier_rank=0 if write else None
        )
        return context

    def save_weights(self, path: Path) -> None:
        """Write the kept parameters atomically, as safetensors in their training dtype."""
        self._save(path, self._kept)

    def load_weights(self, path: Path) -> None:
        """Load saved weights into the model for testing; the optimizer's master weights are not updated.

        Raises:
            KeyError: the names in the file are not exactly those of the kept parameters.
        """
        with self._gathered(self._kept, write=True):
            load_weights(path, self._kept)

    def _save(self, path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
        with self._gathered(parameters):
            tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        if self.workers.first:
            with atomic(path) as partial:
                safetensors.torch.save_file(tensors, partial)
        self.workers.wait()  # others may read it next

    def memory(self, activations_bytes: int, peak: PeakMemory) -> Memory:
        """Memory by kind, computed from the tensors; gradients and optimizer state only for trainable parameters.

        With several workers it is that of the worker with the most of each kind, and the process values are those of
        the worker whose memory grew most. What ZeRO spreads over the workers counts with this worker's part.
        """
        state = [x for values in self._optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
        masters = [x for group in self._optimizer.param_groups for x in group["params"]]
        owned = {p.data_ptr() for p in self.model.parameters()}
        parts = self.workers.count if self.zero_stage >= _GRADIENTS_STAGE else 1
        own = Memory(
            weights_bytes=sum(_held(p, self.workers.count) * p.element_size() for p in self.model.parameters())
            + scale_bytes(self.model),
            gradients_bytes=sum(-(-_numel(p) // parts) * p.element_size() for p in self._trainable.values()),
            optimizer_bytes=sum(x.numel() * x.element_size() for x in state)
            + sum(x.numel() * x.element_size() for x in masters if x.data_ptr() not in owned),
            activations_bytes=activations_bytes,
            process_peak_bytes=peak.peak_bytes(),
            process_before_bytes=peak.before_bytes,
        )
        return most_memory(self.workers.gather(own))

    def save(self, folder: Path, tag: str) -> None:
        """Save a checkpoint: the kept weights, optimizer and schedule."""
        with self._only_trainable():
            self._engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)
        if self.workers.first:
            (folder / tag / _NAMES_FILE).write_text(json.dumps(sorted(self._trainable)), encoding="utf-8")
        self._save(folder / tag / _FROZEN_FILE, self._frozen())

    @contextmanager
    def _only_trainable(self) -> Iterator[None]:
        """Restrict the module state in DeepSpeed's checkpoints to the trainable parameters, each once.

        ``exclude_frozen_parameters`` keeps the second name of a tied tensor (the output layer), frozen or not, and the
        state of quantized layers.
        """
        state_dict = self._engine.module_state_dict

        def trainable(**options: Any) -> dict[str, Any]:
            return {name: value for name, value in state_dict(**options).items() if name in self._trainable}

        self._engine.module_state_dict = trainable
        try:
            yield
        finally:
            del self._engine.module_state_dict  # the method of the class again

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._kept.items() if name not in self._trainable}

    def load(self, folder: Path, tag: str) -> None:
        """Resume from a checkpoint written by ``save``.

        Raises:
            FileNotFoundError: there is no such checkpoint (DeepSpeed only warns).
            ValueError: the tag leads out of the folder, or a file has more than data.
            KeyError: it has other trainable parameters (DeepSpeed does not check this).
        """
        if Path(tag).name != tag:
            raise ValueError(f"{folder}: names the checkpoint {tag!r}, which is not in it")
        names = folder / tag / _NAMES_FILE
        if not names.exists():
            raise FileNotFoundError(f"no checkpoint {tag!r} in {folder}")
        _check_names(folder, json.loads(names.read_text(encoding="utf-8")), self._trainable)
        with self._gathered(self._frozen(), write=True):
            load_weights(folder / tag / _FROZEN_FILE, self._frozen())
        self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)

    def close(self) -> None:
        """Free the engine's memory; the process group stays for the next trial."""
        self._engine.destroy()


def check_finite(loss: float) -> None:
    """Check the loss of a training step.

    Raises:
        FloatingPointError: it is not finite.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training loss became {loss}; a lower learning_rate may help")


def _load_data(path: str, map_location: Any = None) -> Any:
    """Read a file of DeepSpeed's checkpoint. DeepSpeed would unpickle it, which runs any code that the file names.

    Raises:
        ValueError: it has more than tensors, numbers, texts, and three classes of DeepSpeed's that only hold values.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: has more than data, so it is not read; remove the folder, and the trial starts again"
        ) from error


def load_weights(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Load a file written by ``Engine.save_weights`` into parameters.

    Raises:
        KeyError: the names in the file are not exactly those of ``parameters``.
    """
    tensors = safetensors.torch.load_file(path)
    _check_names(path, tensors, parameters)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])


def _numel(p: nn.Parameter) -> int:
    """Number of elements of the whole parameter, which is empty if ZeRO-3 has partitioned it."""
    return int(getattr(p, "ds_numel", p.numel()))


def _held(p: nn.Parameter, workers: int) -> int:
    """Number of elements of a parameter that a worker holds: its part where ZeRO-3 has partitioned it."""
    part: Tensor | None = getattr(p, "ds_tensor", None)
    return part.numel() if workers > 1 and part is not None and not p.numel() else _numel(p)


def most_memory(found: Sequence[Memory]) -> Memory:
    """The memory that a device must have: of each kind that of the worker with the most."""
    grown = [m for m in found if m.process_peak_bytes is not None and m.process_before_bytes is not None]
    most = max(grown, key=lambda m: (m.process_peak_bytes or 0) - (m.process_before_bytes or 0), default=found[0])
    kinds = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
    return most.model_copy(update={kind: max(getattr(m, kind) for m in found) for kind in kinds})


def _check_names(place: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise KeyError(f"{place}: parameters do not match the model; missing: {missing[:3]}, unexpected: {extra[:3]}")


def deepspeed_config(options: Optimizer, zero_stage: int, offload: str = "none") -> dict[str, Any]:
    """The presets of the ZeRO stage and of what is offloaded, with the trial's batch size, precision and clipping.

    DeepSpeed reads the micro batch size for its reports alone: a worker's share of the trial's batch is any number of
    rows.
    """
    preset: dict[str, Any] = _preset(f"zero{zero_stage}")
    if offload != "none":
        added = _preset(f"offload_{offload}")
        preset = {**preset, **added, "zero_optimization": preset["zero_optimization"] | added["zero_optimization"]}
    return {
        **preset,
        "train_micro_batch_size_per_gpu": options.per_device_train_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "gradient_clipping": options.max_grad_norm,  # DeepSpeed's default is 1.0
        "bf16": {"enabled": options.bf16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def _preset(name: str) -> Any:
    return json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))
