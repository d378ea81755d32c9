"""The random generators that training draws from."""

from __future__ import annotations

import torch

from harness.trial.randomness import dropout_seed, random_states, set_random_states


def test_the_random_state_is_that_of_torch() -> None:
    states = random_states()
    drawn = torch.rand(3)
    set_random_states(states)
    assert torch.equal(torch.rand(3), drawn)


def test_dropout_differs_between_workers_and_is_seeded() -> None:
    seeds = [dropout_seed(3, epoch, rank) for epoch in (1, 2) for rank in range(4)]
    assert len({seed % 2**32 for seed in seeds}) == 8  # what torch's generator uses
    assert seeds == [dropout_seed(3, epoch, rank) for epoch in (1, 2) for rank in range(4)]
    assert dropout_seed(3, 1, 0) == 300_010  # of a trial with one worker, as before
