"""Two processes whose batches have different contexts train as one process does on both batches."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import harness
from tests.support.adapted import IMAGE, SPECS, TEXT, adapted_model
from tests.support.models import tiny_llama
from tests.support.passes import METHODS

MORE = {"full": {"method": "full"}, "combination": {"method": "lora+ia3", "rank": 2}}
SPECS_HERE = {**{name: SPECS[name] for name in METHODS}, **MORE}
IDS_BT = torch.tensor([[TEXT] + [IMAGE] * 3 + [TEXT] * 4, [TEXT] * 8])  # only the first row has an image
TOKENS_BT = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(4))
STEPS = 2  # DDP reports parameters without a gradient in the next step


def make(name: str, checkpointing: bool = False) -> Any:
    spec = SPECS_HERE[name]
    adapted = adapted_model(tiny_llama(), spec, "agnostic" if spec["method"] == "full" else "specific").train()
    if checkpointing:
        adapted.activation_checkpointing_enable()
    return adapted


def step(model: Any, rows: slice, backward: Callable[[Tensor], Any] = Tensor.backward) -> None:
    """Sums rather than means, so that two processes' gradients are halves of one's."""
    logits_BTV = model(input_ids=TOKENS_BT[rows], context_ids=IDS_BT[rows], use_cache=False).logits
    backward(logits_BTV.square().sum() * 1e-2)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_halves(folder: Path, names: Iterable[str]) -> None:
    """What both processes kept, as ``NAME-RANK.pt``, against the gradients of one process on both batches."""
    for name in names:
        step(one := make(name), slice(0, 2))
        whole = gradients(one)
        assert any(grad.abs().max() > 0 for grad in whole.values())
        for rank in range(2):
            found = torch.load(folder / f"{name}-{rank}.pt")
            assert found.keys() == whole.keys()
            for key, grad in whole.items():
                torch.testing.assert_close(
                    2 * found[key], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=f"{name}: {key}": f"{n}: {m}"
                )


def spawn(work: Callable[..., None], *args: Any) -> None:
    """Run ``work(rank, *args)`` in two processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = mp.spawn(_as_torchrun, (work, port, args), nprocs=2, join=False)  # type: ignore[no-untyped-call]
    while not both.join(timeout=5, grace_period=5):  # the other one of a pair that failed may not end by itself
        pass


def _as_torchrun(rank: int, work: Callable[..., None], port: int, args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    work(rank, *args)


# ── DistributedDataParallel


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in SPECS_HERE if name != "full"])
def test_no_parameter_is_unused_in_a_batch_without_images(name: str, alone: None) -> None:
    """DDP's default is an error otherwise."""
    model = DistributedDataParallel(make(name))
    for _ in range(STEPS):
        step(model, slice(1, 2))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(key.startswith("module.adapters.") for key in model.state_dict())


def _ddp(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo")
    for name in SPECS_HERE:
        for how, checkpointing in (("plain", False), ("checkpointing", True)):
            model = DistributedDataParallel(make(name, checkpointing))
            for _ in range(STEPS):
                model.zero_grad()
                step(model, slice(rank, rank + 1))
            torch.save(gradients(model.module), folder / how / f"{name}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_has_the_gradients_of_one_process(tmp_path: Path) -> None:
    folders = [tmp_path / how for how in ("plain", "checkpointing")]
    for folder in folders:
        folder.mkdir()
    spawn(_ddp, tmp_path)
    for folder in folders:
        assert_halves(folder, SPECS_HERE)


# ── FSDP


def _fsdp(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for name in ("lora", "moka", "full"):
        model = make(name)
        for block in model.base_model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(STEPS):
            model.zero_grad()
            step(model, slice(rank, rank + 1))
        torch.save({key: grad.full_tensor() for key, grad in gradients(model).items()}, folder / f"{name}-{rank}.pt")
        kept = get_model_state_dict(model)
        assert kept.keys() == make(name).state_dict().keys()
        set_model_state_dict(model, kept)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_fsdp_has_the_gradients_of_one_process(tmp_path: Path) -> None:
    spawn(_fsdp, tmp_path)
    assert_halves(tmp_path, ("lora", "moka", "full"))


# ── accelerate


def _accelerate(rank: int, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    for name in ("lora", "moka", "soft_prompt+bitfit"):
        plain = make(name)
        model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.0))
        for _ in range(STEPS):
            optimizer.zero_grad()
            step(model, slice(rank, rank + 1), accelerator.backward)
            optimizer.step()
        torch.save(gradients(accelerator.unwrap_model(model)), folder / f"{name}-{rank}.pt")
        if name == "lora":
            accelerator.save_state(str(folder / "state"))
            accelerator.wait_for_everyone()
            before = {key: value.clone() for key, value in model.state_dict().items()}
            with torch.no_grad():
                for p in plain.adapters.parameters():
                    p.add_(1.0)
            accelerator.load_state(str(folder / "state"))
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    accelerator.end_training()


@pytest.mark.slow
def test_accelerate_has_the_gradients_of_one_process(tmp_path: Path) -> None:
    spawn(_accelerate, tmp_path)
    assert_halves(tmp_path, ("lora", "moka", "soft_prompt+bitfit"))


# ── Trainer


def _rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": i, "labels": i, "context_ids": c} for i, c in zip(TOKENS_BT, IDS_BT, strict=True)] * 4


def _train(folder: Path, rows_per_process: int, **options: Any) -> harness.AdaptedModel:
    adapted = make("lora")
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=rows_per_process, max_steps=4, save_steps=2, use_cpu=True,
        learning_rate=0.01, report_to=[], disable_tqdm=True, train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    trainer = Trainer(model=adapted, args=arguments, train_dataset=_rows())  # type: ignore[arg-type]
    trainer.train()
    return adapted


def _trainer(rank: int, folder: Path) -> None:
    adapted = _train(folder, 1, ddp_find_unused_parameters=False, activation_checkpointing=True)
    torch.save(adapted.state_dict(), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_trainer_in_two_processes_trains_as_in_one(tmp_path: Path) -> None:
    spawn(_trainer, tmp_path)
    one = _train(tmp_path / "one", 2).state_dict()
    start = make("lora").state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == one.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.allclose(one[name], tensor, atol=1e-2) for name, tensor in start.items())
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
