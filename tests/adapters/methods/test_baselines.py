"""What full fine-tuning and no adapter train of the language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from adapters.methods.baselines import Full, FullConfig, NoAdapter
from tests.support.models import tiny_llama, tiny_opt


def trained(model: Any, method: Any) -> set[str]:
    """By the names of the model's own parameters; tied ones have one name."""
    wanted = {id(p) for p in method.trained(model)}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def untied_llama() -> Any:
    config = tiny_llama().config
    config.tie_word_embeddings = False
    return LlamaForCausalLM(config)


def tied_llama() -> Any:
    config = tiny_llama().config
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make_model", "embeddings"),
    [
        (untied_llama, {"model.embed_tokens.weight", "lm_head.weight"}),
        (tied_llama, {"model.embed_tokens.weight"}),
        # Learned positions are no embeddings in Hugging Face's sense: trained in either case.
        (tiny_opt, {"model.decoder.embed_tokens.weight"}),
    ],
    ids=["untied", "tied", "tied, with learned positions"],
)
def test_full_trains_everything_or_all_but_the_embeddings(make_model: Any, embeddings: set[str]) -> None:
    model = make_model()
    everything = {name for name, _ in model.named_parameters()}
    assert embeddings < everything
    assert trained(model, Full(FullConfig())) == everything
    assert trained(model, Full(FullConfig(embeddings=False))) == everything - embeddings


def test_learned_positions_are_trained_without_the_embeddings() -> None:
    model = tiny_opt()
    assert "model.decoder.embed_positions.weight" in trained(model, Full(FullConfig(embeddings=False)))


def test_no_adapter_trains_nothing_of_the_language_model() -> None:
    assert trained(tiny_llama(), NoAdapter(NoAdapter.Config())) == set()


def test_labels_say_whether_the_embeddings_are_frozen() -> None:
    assert Full(FullConfig()).label() == "full fine-tuning"
    assert Full(FullConfig(embeddings=False)).label() == "full fine-tuning, embeddings frozen"


def test_every_parameter_is_named_once_where_weights_are_tied() -> None:
    parameters = list(Full(FullConfig()).trained(tied_llama()))
    assert len({p.data_ptr() for p in parameters}) == len(parameters)
    assert all(isinstance(p, torch.nn.Parameter) for p in parameters)
