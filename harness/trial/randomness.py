"""The random generators that training draws from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def random_states() -> list[Tensor]:
    """The states of torch's generators: of the CPU, and of the GPU if there is one."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def set_random_states(states: list[Tensor]) -> None:
    """Restore what ``random_states`` gave."""
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def dropout_seed(seed: int, epoch: int, rank: int) -> int:
    """The seed of a worker's dropout in an epoch; torch's CPU generator uses the lowest 32 bits of a seed alone."""
    whole = seed * 100_003 + epoch
    return whole if rank == 0 else int.from_bytes(hashlib.sha256(f"{whole}:{rank}".encode()).digest()[:4])
