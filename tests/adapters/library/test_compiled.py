"""One graph serves all layouts of one shape."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.testing import CompileCounter

from tests.support.adapted import SPECS, adapted_model, logits
from tests.support.adapters import embeds
from tests.support.models import tiny_llama
from tests.support.tiers import some_fast

NAMES = ("lora", "lora, many columns", "dora", "vera", "bitfit", "ia3", "ln_tuning", "bottleneck")
# The others choose by the layout in the same code: low rank, a row of a table for each token, a block for each group.
FAST = ("lora", "bitfit", "bottleneck")


@some_fast("spec", {name: SPECS[name] for name in NAMES}, slow=set(NAMES) - set(FAST))
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
