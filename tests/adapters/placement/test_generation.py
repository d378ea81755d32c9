"""Layouts while generating, for models that keep what they have seen in another form than a KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import harness
from tests.support.adapters import disturb

# Model type → configuration, and roles of its projections.
STATES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "mamba": ({"state_size": 4, "time_step_rank": 4}, {"backbone.layers.*.mixer.in_proj": "up"}),
    "mamba2": (
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        {"backbone.layers.*.mixer.in_proj": "up"},
    ),
    "rwkv": ({"attention_hidden_size": 32}, {"rwkv.blocks.*.attention.key": "k"}),
}
IDS_T = torch.tensor([0, 0, 0, 1, 1])


@pytest.mark.parametrize("model_type", STATES)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("length", [5, 1])
def test_new_tokens_have_their_own_context_whatever_the_model_keeps(
    model_type: str, use_cache: bool, length: int
) -> None:
    options, roles = STATES[model_type]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=96, hidden_size=32, num_hidden_layers=2, initializer_range=0.2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    adapted = harness.adapt(
        model, {"method": "lora", "rank": 2, "where": list(roles.values())}, grouping="specific", roles=roles
    )
    disturb(adapted.adapters.parameters())
    rows = 1 if model_type == "rwkv" else 2  # transformers' RWKV mixes the rows of a batch when it continues a state
    prompt_BT = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(0))
    found = adapted.generate(
        input_ids=prompt_BT, context_ids=IDS_T[:length], new_token_context="text", max_new_tokens=4, do_sample=False,
        eos_token_id=None, attention_mask=torch.ones_like(prompt_BT), output_logits=True,
        return_dict_in_generate=True, use_cache=use_cache,
    )  # fmt: skip
    ids_T = torch.cat([IDS_T[:length], torch.ones(4, dtype=torch.long)])
    with torch.no_grad():
        whole_BTV = adapted(input_ids=found.sequences, context_ids=ids_T, use_cache=False).logits
    for step, logits_BV in enumerate(found.logits):
        torch.testing.assert_close(logits_BV, whole_BTV[:, length - 1 + step].float(), rtol=1e-4, atol=1e-4)
