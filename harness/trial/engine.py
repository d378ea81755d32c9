"""The DeepSpeed engine of one trial: the only place that imports deepspeed.

Works in one process without a port or a launcher. DeepSpeed's just-in-time builds are avoided: nothing here needs a
compiler. Several processes per trial differ in how they call ``join_process_group`` alone.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, Store

from harness.core.files import atomic
from harness.core.record import Memory
from harness.core.weight_decay import parameter_groups
from harness.experiment.sections import Optimizer
from harness.trial.measure import PeakMemory

PRESETS = Path(__file__).parent.parent.parent / "clusters" / "deepspeed"
_PARTITIONED_STAGE = 3
_NAMES_FILE = "trainable.json"
_FROZEN_FILE = "frozen.safetensors"  # what another stage of the trial trains and this one does not


def _import_deepspeed() -> Any:
    """Import DeepSpeed quietly and keep it from building its shared-memory op (inference only; needs g++ and 27 s)."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    return deepspeed


def join_process_group(store: Store | None = None, rank: int = 0, world_size: int = 1) -> None:
    """Join the other processes of the trial, once for this process's life: DeepSpeed cannot leave and join again.

    Args:
        store: where the processes meet (a ``FileStore`` needs no port); None: this process is a group of its own.
        rank: of this process.
        world_size: how many there are.
    """
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=store or HashStore(), rank=rank, world_size=world_size)


def prepare_process() -> None:
    """Load the libraries a trial needs, so that the first trial of a process is not charged with their memory."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, get_scheduler  # noqa: F401

    _import_deepspeed()
    join_process_group()


class _Together(torch.autograd.Function):
    """A zero whose backward is the last to reach the parameters it was made of, as it was made before the model ran.

    Then all of them have a gradient, be it zero, and they are handed to DeepSpeed in one order. ZeRO-2 adds up over the
    processes whatever comes in the same place, so that another order gives wrong gradients without a word.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(p) for p in ctx.saved_tensors)


class Engine:
    """Forward, backward and optimizer step of one model, and its checkpoints.

    Args:
        model: returns (nll_B, tokens_B) when called with a batch; its trainable parameters have ``requires_grad``.
        options: optimizer and schedule.
        total_steps: optimizer steps that this engine is going to take, for the schedule.
        zero_stage: preset ``clusters/deepspeed/zero<stage>.json``.
        keeps: names of the parameters that ``save_weights`` writes and ``load_weights`` reads; None: the trainable
            ones. A trial of several stages keeps what any of them trains.
        units: modules inside of which a process may go other ways than another, by what its batch holds: adapters.
            ZeRO-3 gathers and reduces each as one, because all processes must do that in one order.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Optimizer,
        total_steps: int,
        zero_stage: int,
        keeps: Collection[str] | None = None,
        units: Iterable[nn.Module] = (),
    ) -> None:
        from transformers import get_scheduler

        assert options.learning_rate is not None  # noqa: S101 - the plan resolves it
        deepspeed = _import_deepspeed()
        join_process_group()
        self.model, self.options = model, options
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kept = self._trainable if keeps is None else keeps
        self._kept = {name: p for name, p in model.named_parameters() if name in kept}
        # A torch optimizer: DeepSpeed's own would be compiled on first use.
        optimizer = torch.optim.AdamW(
            parameter_groups(model, options.weight_decay) if options.weight_decay else self._trainable.values(),
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            weight_decay=options.weight_decay,
        )
        warmup_steps = round(options.warmup_ratio * total_steps)
        scheduler = get_scheduler(options.lr_scheduler_type, optimizer, warmup_steps, total_steps)
        units = list(units)
        for module in units:
            deepspeed.utils.set_z3_leaf_module(module, True)
        several = bool(units) and torch.distributed.get_world_size() > 1 and zero_stage < _PARTITIONED_STAGE
        self._together = list(self._trainable.values()) if several else []
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(options, zero_stage),
            dist_init_required=False,
        )
        self._optimizer = optimizer
        # ZeRO-3 keeps parameters in pieces; whoever reads or writes whole ones gathers them first.
        self._gather = deepspeed.zero.GatheredParameters if zero_stage == _PARTITIONED_STAGE else None

    def train_step(self, batch: Any) -> float:
        """One forward, backward and (at an accumulation boundary) optimizer step on the mean NLL per target token.

        Returns:
            The loss in nats per token.

        Raises:
            FloatingPointError: the loss is not finite; the weights were not changed by it.
        """
        together = _Together.apply(*self._together) if self._together else None  # type: ignore[no-untyped-call]
        nll_B, tokens_B = self._engine(batch)
        loss: Tensor = nll_B.sum() / tokens_B.sum()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the training loss became {value}; a lower learning_rate may help")
        self._engine.backward(loss if together is None else loss + together)
        self._engine.step()
        return value

    @property
    def steps(self) -> int:
        """Optimizer steps taken, those before a resume included."""
        return int(self._engine.global_steps)

    @property
    def accumulating(self) -> bool:
        """Whether gradients of earlier batches wait for the next step; a checkpoint would lose them."""
        return bool(self._engine.micro_steps % self.options.gradient_accumulation_steps)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._engine.get_lr()[0])

    def _whole(self, parameters: Mapping[str, nn.Parameter], write: bool = False) -> AbstractContextManager[Any]:
        if self._gather is None or not parameters:
            return nullcontext()
        context: AbstractContextManager[Any] = self._gather(
            list(parameters.values()), modifier_rank=0 if write else None
        )
        return context

    def save_weights(self, path: Path) -> None:
        """Write the parameters it keeps, atomically, as safetensors in the dtype they are trained in."""
        self._save(path, self._kept)

    def load_weights(self, path: Path) -> None:
        """Put saved weights into the model, for testing it; the optimizer's own copies stay as they are.

        Raises:
            KeyError: the file's names are not exactly those of the parameters it keeps.
        """
        with self._whole(self._kept, write=True):
            load_weights(path, self._kept)

    def _save(self, path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
        with self._whole(parameters):
            tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        if torch.distributed.get_rank() == 0:
            with atomic(path) as partial:
                safetensors.torch.save_file(tensors, partial)
        torch.distributed.barrier()  # the others may read it next

    def memory(self, activations_bytes: int, peak: PeakMemory) -> Memory:
        """Memory by kind, from the tensors that exist; gradients and optimizer state only of what is trained."""
        state = [x for values in self._optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
        masters = [x for group in self._optimizer.param_groups for x in group["params"]]
        owned = {p.data_ptr() for p in self.model.parameters()}
        return Memory(
            weights_bytes=sum(_numel(p) * p.element_size() for p in self.model.parameters()),
            gradients_bytes=sum(_numel(p) * p.element_size() for p in self._trainable.values()),
            optimizer_bytes=sum(x.numel() * x.element_size() for x in state)
            + sum(x.numel() * x.element_size() for x in masters if x.data_ptr() not in owned),
            activations_bytes=activations_bytes,
            process_peak_bytes=peak.peak_bytes(),
            process_before_bytes=peak.before_bytes,
        )

    def save(self, folder: Path, tag: str) -> None:
        """Save what is needed to resume: the weights it keeps, optimizer and schedule."""
        self._engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)
        if torch.distributed.get_rank() == 0:
            (folder / tag / _NAMES_FILE).write_text(json.dumps(sorted(self._trainable)), encoding="utf-8")
        self._save(folder / tag / _FROZEN_FILE, self._frozen())

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._kept.items() if name not in self._trainable}

    def load(self, folder: Path, tag: str) -> None:
        """Resume from ``save``.

        Raises:
            FileNotFoundError: there is no such checkpoint (DeepSpeed itself would only warn).
            KeyError: it is of other trainable parameters (DeepSpeed itself would not tell).
        """
        names = folder / tag / _NAMES_FILE
        if not names.exists():
            raise FileNotFoundError(f"no checkpoint {tag!r} in {folder}")
        _check_names(folder, json.loads(names.read_text(encoding="utf-8")), self._trainable)
        with self._whole(self._frozen(), write=True):
            load_weights(folder / tag / _FROZEN_FILE, self._frozen())
        self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)

    def close(self) -> None:
        """Free what the engine holds; the process group stays for the next trial."""
        self._engine.destroy()


def load_weights(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Read what ``Engine.save_weights`` wrote into parameters, by name.

    Raises:
        KeyError: the file's names are not exactly theirs.
    """
    tensors = safetensors.torch.load_file(path)
    _check_names(path, tensors, parameters)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])


def _numel(p: nn.Parameter) -> int:
    """Of the whole parameter: one that ZeRO-3 has partitioned looks empty."""
    return int(getattr(p, "ds_numel", p.numel()))


def _check_names(place: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise KeyError(f"{place}: not the weights of this model; missing: {missing[:3]}, not expected: {extra[:3]}")


def deepspeed_config(options: Optimizer, zero_stage: int) -> dict[str, Any]:
    """The preset of the ZeRO stage, completed with the trial's batch, precision and clipping."""
    preset: dict[str, Any] = json.loads((PRESETS / f"zero{zero_stage}.json").read_text(encoding="utf-8"))
    return {
        **preset,
        "train_micro_batch_size_per_gpu": options.per_device_train_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "gradient_clipping": options.max_grad_norm,  # DeepSpeed clips at 1.0 unless told otherwise
        "bf16": {"enabled": options.bf16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
