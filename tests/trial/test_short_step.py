"""A lone process's shortened step is DeepSpeed's, up to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.trial.short_step import reading, shorten


class Engine:
    """What ``shorten`` replaces of DeepSpeed's engine."""

    enable_backward_allreduce = True

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)


def test_a_parameter_that_the_batch_did_not_use_is_stepped_as_with_a_gradient_of_zeros() -> None:
    used, unused = (nn.Parameter(torch.ones(3)) for _ in range(2))
    engine = Engine([used, unused])
    shorten(engine, (used, unused), 1.0)
    used.sum().backward()
    engine.clip_fp32_gradients()  # type: ignore[attr-defined]
    engine.optimizer.step()
    torch.testing.assert_close(unused.detach(), torch.full((3,), 1 - 0.1 * 0.5))
    engine.zero_grad()  # type: ignore[attr-defined]
    assert used.grad is None
    assert unused.grad is None
    assert not engine.enable_backward_allreduce


def test_gradients_are_clipped_to_the_norm() -> None:
    p = nn.Parameter(torch.zeros(2))
    engine = Engine([p])
    shorten(engine, (p,), 0.5)
    p.grad = torch.tensor([3.0, 4.0])
    engine.clip_fp32_gradients()  # type: ignore[attr-defined]
    torch.testing.assert_close(p.grad, torch.tensor([0.3, 0.4]))


def test_a_number_is_read_with_its_value() -> None:
    assert reading(torch.tensor(0.5, requires_grad=True) * 3)() == 1.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_number_read_is_that_of_the_moment_when_reading_began() -> None:
    number = torch.tensor(0.5, device="cuda")
    read = reading(number)
    number += 1
    assert read() == 0.5
