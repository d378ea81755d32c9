"""Which errors are a lack of memory; tests/faults makes real ones."""

from __future__ import annotations

import errno

import pytest
import torch

from harness.core.exhaustion import is_out_of_memory

ALLOCATOR = "[enforce fail at alloc_cpu.cpp] err == 0. DefaultCPUAllocator: can't allocate memory: tried to allocate"


def caused_by(cause: BaseException) -> ValueError:
    error = ValueError("could not read the batch")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(f"{ALLOCATOR} 4000000000000 bytes."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        caused_by(MemoryError("no room")),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [ValueError("out of memory"), RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left on device")],
)
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_what_torch_says_when_the_machine_has_not_enough() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
