"""Budgets: nested subsets by seed, the same order for all methods, fingerprints that detect any change."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.core.errors import UserError
from harness.model.budget import Order, choose, content_fingerprint
from harness.model.inputs import Inputs
from harness.model.workers import Workers
from tasks.base import Example

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
EXAMPLES = [Example(f"{n:05d}", {}, tuple(f"caption {k} of {n}" for k in range(5))) for n in range(3000)]
digest = Inputs(Path("no run folder")).digest
WHAT = "budget.examples: task made_up"


def ids(examples: list[Example]) -> list[str]:
    return [example.id for example in examples]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_smaller_budgets_are_subsets_of_larger_ones(seed: int) -> None:
    small, middle, large = (set(ids(choose(EXAMPLES, count, seed, WHAT))) for count in (128, 512, 2048))
    assert (len(small), len(middle), len(large)) == (128, 512, 2048)
    assert small < middle < large < set(ids(EXAMPLES))


def test_seeds_choose_different_examples() -> None:
    first, second = (set(ids(choose(EXAMPLES, 512, seed, WHAT))) for seed in (0, 1))
    shared = len(first & second)
    # By chance 512 · 512 / 3000 = 87 are in both (standard deviation 8).
    assert 47 < shared < 127


def test_the_choice_is_uniform_over_the_file() -> None:
    positions = [int(example.id) for example in choose(EXAMPLES, 512, 0, WHAT)]
    # Uniform: mean 1,500, standard error 3000 / sqrt(12 · 512) = 38.
    assert np.mean(positions) == pytest.approx(1500, abs=4 * 38)


def test_the_choice_does_not_depend_on_the_order_of_the_file() -> None:
    shuffled = [EXAMPLES[i] for i in np.random.default_rng(0).permutation(len(EXAMPLES))]
    assert choose(shuffled, 512, 3, WHAT) == choose(EXAMPLES, 512, 3, WHAT)


def test_more_data_does_not_change_the_relative_order() -> None:
    few = ids(choose(EXAMPLES[:1000], "all", 0, WHAT))
    many = ids(choose(EXAMPLES, "all", 0, WHAT))
    assert [i for i in many if i in set(few)] == few


def test_all_is_every_example() -> None:
    assert sorted(ids(choose(EXAMPLES, "all", 5, WHAT))) == ids(EXAMPLES)


def test_all_examples_may_be_requested_but_not_one_more() -> None:
    assert len(choose(EXAMPLES, 3000, 0, WHAT)) == 3000
    message = f"{WHAT}: requests 3,001 examples, but there are 3,000; allowed: at most 3,000"
    with pytest.raises(UserError, match=re.escape(message)):
        choose(EXAMPLES, 3001, 0, WHAT)


@pytest.mark.parametrize("epoch", [1, 2, 8])
def test_an_epoch_has_every_example_once_with_one_of_its_references(epoch: int) -> None:
    draws = Order(EXAMPLES, 0).epoch(epoch)
    assert sorted(draw.example for draw in draws) == list(range(3000))
    counts = np.bincount([draw.reference for draw in draws], minlength=5)
    assert len(counts) == 5
    # Each of the five references 600 times, standard deviation 22.
    assert counts == pytest.approx(np.full(5, 600), abs=5 * 22)


def test_an_example_with_fewer_references_draws_among_its_own() -> None:
    examples = [replace(example, references=example.references[: 1 + n % 3]) for n, example in enumerate(EXAMPLES)]
    for draw in Order(examples, 0).epoch(1):
        assert 0 <= draw.reference < len(examples[draw.example].references)


def test_orders_differ_by_seed_and_epoch_and_repeat_otherwise() -> None:
    orders = {
        (seed, epoch): tuple(Order(EXAMPLES[:64], seed).epoch(epoch)) for seed in (0, 1, 2) for epoch in (1, 2, 3)
    }
    assert len(set(orders.values())) == len(orders)
    assert tuple(Order(EXAMPLES[:64], 2).epoch(3)) == orders[2, 3]


GROUPED = Order(EXAMPLES[:64], 3, "grouped")


def test_grouped_items_are_those_of_all_with_an_examples_references_in_succession() -> None:
    for epoch in (1, 2):
        draws, every = GROUPED.epoch(epoch), Order(EXAMPLES[:64], 3, "all").epoch(epoch)
        assert sorted((d.example, d.reference) for d in draws) == sorted((d.example, d.reference) for d in every)
        blocks = [draws[start : start + 5] for start in range(0, 320, 5)]
        assert all(len({d.example for d in block}) == len({d.view for d in block}) == 1 for block in blocks)
        assert len({d.view for d in draws}) == 64
    first, second = ([d.example for d in GROUPED.epoch(epoch)] for epoch in (1, 2))
    assert first != second
    assert GROUPED.draws == 320
    assert GROUPED.epoch(2) == Order(EXAMPLES[:64], 3, "grouped").epoch(2)
    prints = {Order(EXAMPLES[:64], 3, kind).fingerprint(1, 16) for kind in ("one", "all", "grouped")}
    assert len(prints) == 3


def test_grouped_examples_with_one_picture_follow_one_another(tmp_path: Path) -> None:
    asked = [
        Example(f"{n}-{k}", {"image": tmp_path / f"{n}.png", "text": f"question {k}"}, (f"answer {k}",))
        for k in range(3)
        for n in range(6)
    ]
    order = Order(asked, 0, "grouped")
    draws = order.epoch(1)
    for start in range(0, 18, 3):
        block = draws[start : start + 3]
        assert len({asked[d.example].files for d in block}) == len({d.view for d in block}) == 1
    assert sorted(d.example for d in draws) == list(range(18))
    assert order.repeats_inputs
    assert Order(asked, 0).repeats_inputs
    assert not Order(asked[:6], 0).repeats_inputs
    assert Order(asked[:6], 0, shares={"": 1.0}).repeats_inputs


@pytest.mark.parametrize("shares", [{"few": 0.5, "many": 0.5}, {"few": 0.05, "many": 0.95}])
def test_grouped_members_have_their_shares(shares: dict[str, float]) -> None:
    examples = [replace(e, member="few" if n < 10 else "many") for n, e in enumerate(EXAMPLES[:64])]
    order = Order(examples, 0, "grouped", shares)
    draws = order.epoch(1)
    assert len(draws) == order.draws == 320
    few = [draw for draw in draws if draw.example < 10]
    assert len(few) == 320 * shares["few"]
    runs = sum(one.example != other.example for one, other in itertools.pairwise(few)) + 1
    assert runs <= len(few) // 5 + 1
    if shares["few"] > 0.1:  # each of them as often as every other, up to once
        counts = np.bincount([draw.example for draw in few], minlength=10)
        assert counts.max() - counts.min() <= 5
    assert order.epoch(2) != draws


def test_workers_get_the_items_of_one_picture_together() -> None:
    draws = GROUPED.epoch(1)[:20]
    shares = [GROUPED.share(draws, Workers(rank, 3)) for rank in range(3)]
    assert [draw for share in shares for draw in share] == draws
    assert [len(share) for share in shares] == [6, 7, 7]
    one = Order(EXAMPLES[:64], 3)
    assert one.share(draws, Workers(1, 3)) == draws[1::3]


def pictures(folder: Path, count: int = 8) -> list[Example]:
    """Examples with a file each."""
    examples = []
    for n in range(count):
        path = folder / f"{n}.png"
        path.write_bytes(b"x" * (10 + n))
        examples.append(Example(str(n), {"image": path}, (f"a {n}", f"the {n}")))
    return examples


Change = Callable[[list[Example]], list[Example]]
CHANGES: dict[str, Change] = {
    "one caption": lambda e: [replace(e[0], references=("a 0", "the 0!")), *e[1:]],
    "captions in another order": lambda e: [replace(e[0], references=e[0].references[::-1]), *e[1:]],
    "one caption less": lambda e: [replace(e[0], references=e[0].references[:1]), *e[1:]],
    "a caption cut in two": lambda e: [replace(e[0], references=("a", " 0", "the 0")), *e[1:]],
    "another id": lambda e: [replace(e[0], id="100"), *e[1:]],
    "one example less": lambda e: e[1:],
    "an example twice": lambda e: [*e, e[0]],
    "pictures exchanged": lambda e: [replace(e[0], inputs=e[1].inputs), replace(e[1], inputs=e[0].inputs), *e[2:]],
    "a picture for another context": lambda e: [replace(e[0], inputs={"audio": e[0].inputs[0].value}), *e[1:]],
}


def test_the_content_fingerprint_notices_every_change(tmp_path: Path) -> None:
    examples = pictures(tmp_path)
    found = {"as it is": content_fingerprint(examples, digest)}
    found |= {case: content_fingerprint(change(examples), digest) for case, change in CHANGES.items()}
    assert [(a, b) for a in found for b in found if a < b and found[a] == found[b]] == []


def test_the_content_fingerprint_notices_a_file_of_another_size(tmp_path: Path) -> None:
    examples = pictures(tmp_path)
    before = content_fingerprint(examples, digest)
    examples[3].files[0][1].write_bytes(b"x" * 99)
    assert content_fingerprint(examples, digest) != before


def test_the_content_fingerprint_does_not_depend_on_paths_or_order(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    assert content_fingerprint(pictures(here), digest) == content_fingerprint(pictures(there)[::-1], digest)


def test_one_example_swapped_changes_both_fingerprints() -> None:
    chosen = choose(EXAMPLES, 16, 0, WHAT)
    other = [*chosen[:-1], choose(EXAMPLES, 17, 0, WHAT)[-1]]
    assert content_fingerprint(chosen, digest) != content_fingerprint(other, digest)
    assert Order(chosen, 0).fingerprint(2, 4) != Order(other, 0).fingerprint(2, 4)


def test_the_order_fingerprint_notices_seed_epochs_batch_and_order() -> None:
    chosen = choose(EXAMPLES, 64, 0, WHAT)
    prints = {
        "as it is": Order(chosen, 0).fingerprint(2, 32),
        "seed": Order(chosen, 1).fingerprint(2, 32),
        "epochs": Order(chosen, 0).fingerprint(3, 32),
        "batch": Order(chosen, 0).fingerprint(2, 16),
        "order given": Order(chosen[::-1], 0).fingerprint(2, 32),
        "fewer references": Order([replace(e, references=e.references[:2]) for e in chosen], 0).fingerprint(2, 32),
    }
    assert len(set(prints.values())) == len(prints)
    assert Order(choose(EXAMPLES[::-1], 64, 0, WHAT), 0).fingerprint(2, 32) == prints["as it is"]


def test_fingerprints_are_equal_across_processes() -> None:
    code = """
from harness.model.budget import Order, choose, content_fingerprint
from tasks.base import Example
examples = [Example(f"{n:05d}", {}, tuple(f"caption {k} of {n}" for k in range(5))) for n in range(3000)]
chosen = choose(examples, 64, 7, "")
print(content_fingerprint(chosen, str), Order(chosen, 7).fingerprint(2, 32))
"""
    chosen = choose(EXAMPLES, 64, 7, WHAT)
    here = f"{content_fingerprint(chosen, digest)} {Order(chosen, 7).fingerprint(2, 32)}"
    for hash_seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        there = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        assert there.stdout.strip() == here
