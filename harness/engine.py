"""The DeepSpeed engine of one trial: the only place that imports deepspeed.

Works in one process without a port or a launcher. DeepSpeed's just-in-time builds are avoided: nothing here needs a
compiler. Several processes per trial change only ``join_process_group``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from harness.experiment import Optimizer
from harness.measure import PeakMemory
from harness.record import Memory

PRESETS = Path(__file__).parent.parent / "clusters" / "deepspeed"
_PARTITIONED_STAGE = 3
_NAMES_FILE = "trainable.json"


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


def join_process_group() -> None:
    """Make this process a group of its own, once for its life: DeepSpeed cannot leave and join again."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def prepare_process() -> None:
    """Load the libraries a trial needs, so that the first trial of a process is not charged with their memory."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, get_scheduler  # noqa: F401

    _import_deepspeed()
    join_process_group()


class Engine:
    """Forward, backward and optimizer step of one model, and its checkpoints.

    Args:
        model: returns (nll_B, tokens_B) when called with a batch; its trainable parameters have ``requires_grad``.
        options: optimizer and schedule.
        total_steps: optimizer steps of the whole trial, for the schedule.
        zero_stage: preset ``clusters/deepspeed/zero<stage>.json``.
    """

    def __init__(self, model: nn.Module, options: Optimizer, total_steps: int, zero_stage: int) -> None:
        from transformers import get_scheduler

        assert options.learning_rate is not None  # noqa: S101 - the plan resolves it
        deepspeed = _import_deepspeed()
        join_process_group()
        self.model, self.options = model, options
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # A torch optimizer: DeepSpeed's own would be compiled on first use.
        optimizer = torch.optim.AdamW(
            self._trainable.values(),
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            weight_decay=options.weight_decay,
        )
        warmup_steps = round(options.warmup_ratio * total_steps)
        scheduler = get_scheduler(options.lr_scheduler_type, optimizer, warmup_steps, total_steps)
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
        nll_B, tokens_B = self._engine(batch)
        loss: Tensor = nll_B.sum() / tokens_B.sum()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the training loss became {value}; a lower learning_rate may help")
        self._engine.backward(loss)
        self._engine.step()
        return value

    @property
    def steps(self) -> int:
        """Optimizer steps taken, those before a resume included."""
        return int(self._engine.global_steps)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._engine.get_lr()[0])

    def _whole(self, write: bool) -> AbstractContextManager[Any]:
        if self._gather is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self._gather(
            list(self._trainable.values()), modifier_rank=0 if write else None
        )
        return context

    def save_weights(self, path: Path) -> None:
        """Write the trainable parameters alone, atomically, as safetensors in the dtype they are trained in."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with self._whole(write=False):
            tensors = {name: p.detach().cpu().contiguous() for name, p in self._trainable.items()}
            safetensors.torch.save_file(tensors, partial)
        partial.replace(path)

    def load_weights(self, path: Path) -> None:
        """Put saved weights into the model, for testing it; the optimizer's own copies stay as they are.

        Raises:
            KeyError: the file's names are not exactly those of the trainable parameters.
        """
        tensors = safetensors.torch.load_file(path)
        _check_names(path, tensors, self._trainable)
        with self._whole(write=True), torch.no_grad():
            for name, p in self._trainable.items():
                p.copy_(tensors[name])

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
        """Save what is needed to resume: trainable weights, optimizer and schedule."""
        self._engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)
        (folder / tag / _NAMES_FILE).write_text(json.dumps(sorted(self._trainable)), encoding="utf-8")

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
        self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)

    def close(self) -> None:
        """Free what the engine holds; the process group stays for the next trial."""
        self._engine.destroy()


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
