"""One graph serves all layouts of one shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.support.adapted import LORA, adapted_model, logits
from tests.support.adapters import embeds
from tests.support.models import tiny_llama

SPECS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "many columns": {"method": "lora", "rank": 16},
    "dora": {"method": "dora", "rank": 3},
    "vera": {"method": "vera", "rank": 5},
    "bitfit": {"method": "bitfit"},
    "ia3": {"method": "ia3"},
    "ln_tuning": {"method": "ln_tuning"},
    "bottleneck": {"method": "bottleneck", "bottleneck_size": 4},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_layouts_of_one_shape_share_a_graph(spec: Any) -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    del model.model.layers[1:]
    adapted = adapted_model(model, spec)
    alike = [torch.tensor([0] * k + [1] * (11 - k)) for k in (1, 4, 7, 10)]
    differ = [torch.stack([ids, ids.flip(0), ids]) for ids in alike]
    cases = [*alike, torch.tensor([1, 0] * 5 + [1]), *differ]
    expected = [logits(adapted, embeds(), ids, use_cache=False) for ids in cases]

    counter = CompileCounter()
    plain = model.model.forward
    model.model.forward = torch.compile(plain, backend=counter)
    for ids, expected_BTV in zip(cases, expected, strict=True):
        found_BTV = logits(adapted, embeds(), ids, use_cache=False)
        torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3  # rows alike, and rows that differ, of which dynamo may make the size dynamic
