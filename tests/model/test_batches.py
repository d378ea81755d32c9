"""Batches whose rows differ: prompts of several lengths, contexts that come and go, against one row at a time.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.methods.bitfit import BitFit, BitFitConfig
from adapters.methods.ia3 import IA3, IA3Config
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.placement.router import Router
from harness.core.errors import UserError
from harness.experiment.sections import Backbone, Budget, Evaluation
from harness.model.backbones import load_language_model
from harness.model.batches import BatchMaker, text_key
from harness.model.context_model import ContextModel
from harness.model.features import Features
from harness.model.projector import Projector
from harness.model.row_lengths import RowLengths
from harness.trial.evaluate import Evaluator
from tasks.base import Config, Example, Part, Split, Task
from tasks.modalities.image import Image as ImageModality
from tests.support.adapters import disturb

CPU = torch.device("cpu")
METHODS: dict[str, AdapterMethod] = {
    "lora": LoRA(LoRAConfig(rank=3)),
    "bitfit": BitFit(BitFitConfig()),
    "ia3": IA3(IA3Config()),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Questions(Task):
    """Questions with or without a picture, in any order."""

    contexts = ("image", "question", "answer")
    modalities: Mapping[str, str] = {"image": "image"}
    metrics = ("captions",)
    Config = Config
    augmented = frozenset({"image"})

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    def prepare(self) -> None:
        pass

    def examples(self, split: Split) -> Sequence[Example]:
        raise NotImplementedError

    def augment(self, context: str, item: Any, rng: np.random.Generator) -> Any:
        return item.rotate(int(rng.integers(4)) * 90)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return [
        Example("a", (Part("image", folder / "0.png"), Part("question", "what is left of it?")), (" two cups", " a")),
        Example("b", (Part("question", "what?"), Part("image", folder / "1.png")), (" a red star and a circle",)),
        Example("c", (Part("question", "how many circles does anna have now that ben took one?"),), (" one",)),
        Example(
            "d",
            (
                Part("image", folder / "0.png"),
                Part("image", folder / "2.png"),
                Part("question", "which is larger?"),
                Part("answer", " the first"),
                Part("question", "why?"),
            ),
            (" it is",),
        ),
        Example("e", (), (" nothing was asked",)),
    ]


def made(method: AdapterMethod, **options: Any) -> tuple[ContextModel, BatchMaker]:
    """The built-in backbones with disturbed context-specific adapters."""
    backbone = Backbone(projector_dropout=0.0, **options)
    base = load_language_model(backbone)
    router = Router({context: context for context in Questions.contexts})
    adapters = Adapters(base.model.requires_grad_(False), dict.fromkeys(router.groups, method), router, seed=0)
    disturb(adapters.parameters(), scale=0.1)
    adapters.attach(base.model)
    torch.manual_seed(0)
    encoder = ImageModality().encoder("builtin/tiny-vision")
    model = ContextModel(base.model, {"image": Projector(encoder.width, 96, backbone)}, adapters, router)
    features = Features(Questions(Config()), {"image": ImageModality()}, {"image": encoder}, CPU)
    return model.eval(), BatchMaker(features, base, Budget(), backbone)


OPTIONS = {
    "plain": {},
    "mlp": {"projector": "mlp"},
    "boundary": {"projector_boundary_tokens": True},
    "all": {"projector": "mlp", "projector_boundary_tokens": True, "projector_positions": 20},
}


def evaluator(model: Any, batches: BatchMaker, batch_size: int = 16, num_beams: int = 1) -> Evaluator:
    options = Evaluation(per_device_eval_batch_size=batch_size, max_new_tokens=8, num_beams=num_beams)
    return Evaluator(model, batches, options, CPU)


@each_method
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_that_differ_are_scored_as_in_a_batch_of_one(
    method: AdapterMethod, options: dict[str, Any], examples: list[Example]
) -> None:
    model, batches = made(method, **options)
    together = evaluator(model, batches).likelihood(examples)
    for index, example in enumerate(examples):
        alone = evaluator(model, batches, 1).likelihood([example])
        np.testing.assert_allclose(together.nll[index], alone.nll[0], rtol=2e-5)
        np.testing.assert_allclose(together.first_nll[index], alone.first_nll[0], rtol=2e-5)
        assert together.tokens[index] == alone.tokens[0]
    assert together.tokens[0] > together.first_tokens[0] > 0


@each_method
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_from_prompts_of_mixed_lengths_equals_that_from_each_prompt(
    method: AdapterMethod, num_beams: int, examples: list[Example]
) -> None:
    model, batches = made(method)
    found = evaluator(model, batches, 16, num_beams).generate(examples)
    assert list(found) == [example.id for example in examples]
    alone = [evaluator(model, batches, 1, num_beams).generate([e]) for e in examples]
    assert found == {key: text for one in alone for key, text in one.items()}
    assert len(set(found.values())) > 2


def test_beams_find_what_greedy_search_does_not(examples: list[Example]) -> None:
    model, batches = made(METHODS["lora"])
    greedy, beams = (evaluator(model, batches, 16, n).generate(examples) for n in (1, 4))
    assert greedy != beams


def test_a_row_has_the_inputs_in_the_order_of_the_example(examples: list[Example]) -> None:
    _, batches = made(METHODS["lora"], projector_boundary_tokens=True)
    tokenizer = batches.language_model.tokenizer
    batch = batches.make([examples[0], examples[2]], [" two cups", " one"])
    question, answer = (tokenizer(text)["input_ids"] for text in ("what is left of it?", " two cups"))
    length = 1 + 18 + len(question) + len(answer) + 1
    ids = [batches.language_model.tokenizer.bos_token_id, *[0] * 18, *question, *answer, batches.language_model.eos_id]
    assert batch.token_ids_BT[0, :length].tolist() == ids
    contexts = [2, *[0] * 18, *[1] * len(question), *[2] * (len(answer) + 1)]
    assert batch.context_ids_BT[0, :length].tolist() == contexts
    own = batch.targets.row_N == 0
    assert batch.targets.label_N[own].tolist() == ids[-len(answer) - 1 :]
    assert (batch.targets.source_N[own] + 1).tolist() == list(range(19 + len(question), length))
    assert batch.items["image"].positions_P.tolist() == list(range(1, 19))
    assert batch.items["image"].lengths == (16,)
    assert batch.segments is None
    assert batch.positions == int(batch.mask_BT.sum()) - 2


def test_a_batch_without_a_context_still_trains_nothing_of_it_but_touches_all(examples: list[Example]) -> None:
    """Gradients are zero, not missing: ZeRO needs every parameter in every step's graph."""
    model, batches = made(METHODS["lora"], **OPTIONS["all"])
    model.train()
    nll_B, _ = model(batches.make([examples[2], examples[4]], [" one", " two"]))
    nll_B.sum().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        seen = "image" not in name
        assert seen or not parameter.grad.any(), name
    assert model.adapters.parameters_by_group()["image"] > 0


def test_an_item_with_more_tokens_than_positions_is_an_error(examples: list[Example]) -> None:
    model, batches = made(METHODS["lora"], projector_positions=15)
    batch = batches.make(examples[:1], [" a"])
    with pytest.raises(UserError, match=r"projector_positions: 15 positions, but an input has 16 tokens"):
        model(batch)


def test_learned_positions_and_boundary_tokens_are_at_the_right_positions(examples: list[Example]) -> None:
    model, batches = made(METHODS["lora"], projector_boundary_tokens=True, projector_positions=16)
    batch = batches.prompts([examples[3]])
    projector: Any = model.projectors["image"]
    embeds_TD = model.embed(batch)[0]
    first_ND, second_ND = batch.items["image"].features_MD.split(16)
    for start, features_ND in ((1, first_ND), (19, second_ND)):
        torch.testing.assert_close(embeds_TD[start], projector.boundary[0])
        expected_ND = projector.layers(features_ND) + projector.positions
        torch.testing.assert_close(embeds_TD[start + 1 : start + 17], expected_ND)
        torch.testing.assert_close(embeds_TD[start + 17], projector.boundary[1])


def test_augmentation_depends_on_its_seed_and_is_not_applied_in_evaluation(examples: list[Example]) -> None:
    _, batches = made(METHODS["lora"])

    def seen(view: int | None) -> torch.Tensor:
        views = None if view is None else [view]
        return batches.make(examples[:1], [" a"], views).items["image"].features_MD

    plain = seen(None)
    views = [seen(view) for view in range(8)]
    assert all(torch.equal(seen(view), views[view]) for view in range(8))
    assert 1 < len({tuple(x.flatten().tolist()) for x in views}) <= 4  # of four quarter turns
    assert torch.equal(seen(None), plain)


def test_texts_that_are_too_long_are_truncated_and_counted() -> None:
    model, batches = made(METHODS["lora"])
    batches.budget = Budget(max_input_length=5, max_target_length=4)
    example = Example("long", (Part("question", "one two three " * 50),), (" four" * 50,))
    batch = batches.make([example], [example.references[0]])
    assert batch.token_ids_BT.shape == (1, 1 + 5 + 4 + 1)
    assert (batches.cut_inputs, batches.cut_targets) == (
        {text_key(example.inputs[0].value)},
        {text_key(example.references[0])},
    )
    model(batch)


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"prompt": "Answer:"}], ids=[*OPTIONS, "prompt"])
def test_the_lengths_of_rows_are_known_before_any_is_made(options: dict[str, Any], examples: list[Example]) -> None:
    _, batches = made(METHODS["lora"], **options)
    long = Example("long", (Part("question", "why " * 300),), (" because" * 80, " x"))
    every = [*examples, long]
    lengths, ticks = RowLengths(batches, every), list[None]()
    lengths.count(lambda: ticks.append(None))
    assert len(ticks) == 1
    found = [lengths(index, n) for index, example in enumerate(every) for n in range(len(example.references))]
    assert not batches.cut_targets | batches.cut_inputs  # a text is noted when a batch has it
    rows = [batches.make([example], [text]) for example in every for text in example.references]
    assert found == [int(row.mask_BT.sum()) for row in rows]
    assert batches.cut_targets
    assert batches.cut_inputs


def test_targets_may_begin_with_a_space_but_predictions_do_not(examples: list[Example]) -> None:
    """The built-in language model has never seen "ix" and "ven", which "six" and "seven" end with without a space."""
    _, plain = made(METHODS["lora"])
    _, spaced = made(METHODS["lora"], add_prefix_space=True)
    ids = plain.make(examples[4:], [" six"]).token_ids_BT.tolist()
    assert spaced.make(examples[4:], ["six"]).token_ids_BT.tolist() == ids
    assert spaced.make(examples[4:], [" six"]).token_ids_BT.tolist() == ids
    assert plain.make(examples[4:], ["six"]).token_ids_BT.tolist() != ids
    assert spaced.decode(torch.tensor(ids)[:, 1:]) == ["six"]


# ── Questions about one picture, and turns


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    folder = tmp_path_factory.mktemp("asked")
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    first, second = (Part("image", folder / f"{number}.png") for number in range(2))
    turn = (first, Part("question", "what is left?"), Part("answer", " a cup"), Part("question", "and right of it?"))
    return [
        Example("a", (first, Part("question", "how many circles are there?")), (" two", " two of them", " 2")),
        Example("b", (first, Part("question", "what?")), (" a star", " one")),
        Example("c", turn, (" nothing",)),
        Example("d", (second, Part("question", "what is above the red one?")), (" a square",)),
        Example("e", (Part("question", "why?"), second), (" because",)),
        Example("f", (Part("question", "without a picture?"),), (" yes", " no")),
        Example("g", (first,), (" a picture",)),
    ]


@each_method
@pytest.mark.parametrize("options", [{}, {"prompt": "Answer:"}], ids=["plain", "prompt"])
def test_questions_about_one_picture_go_on_from_it(
    asked: list[Example], method: AdapterMethod, options: dict[str, Any]
) -> None:
    model, batches = made(method, **options)
    ready, plain = evaluator(model, batches), replace(evaluator(model, batches, 1), shared_prefix=False)
    expected = [plain.likelihood([example]) for example in asked]
    read: list[tuple[int, ...]] = []
    handle = model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    found = ready.likelihood(asked)
    handle.remove()
    assert model.goes_on
    np.testing.assert_allclose(found.nll, [one.nll[0] for one in expected], rtol=2e-5)
    np.testing.assert_array_equal(found.tokens, [one.tokens[0] for one in expected])
    assert (1, 17) in read  # BOS and the first picture, for all that is asked about it
    assert {**ready.generate(asked)} == {k: v for e in asked for k, v in plain.generate([e]).items()}
