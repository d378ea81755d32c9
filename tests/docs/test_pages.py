"""The documentation matches the code: methods, options, defaults, families, links; its adapter example runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import harness
from adapters.placement.families import FAMILIES
from adapters.registry import ADAPTERS
from harness.cli.plugins import options_of
from tasks.registry import METRICS, TASKS
from tests.support.models import tiny_llama

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "adapters.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
# Method → its section.
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^#{2,3} )", TEXT, re.MULTILINE | re.DOTALL))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
OURS = {n: e for n, e in ADAPTERS.entries().items() if e.origin.startswith("context-peft-harness ")}


def test_every_method_has_a_section_and_no_other() -> None:
    assert sorted(SECTIONS) == sorted(OURS)


@pytest.mark.parametrize("name", OURS)
def test_every_option_stands_there_with_its_default_and_what_is_allowed(name: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", SECTIONS[name], re.MULTILINE)
    config = ADAPTERS.load(OURS[name].target).Config
    assert rows == [(option.name, option.default, option.allowed) for option in options_of(config)]


@pytest.mark.parametrize("name", OURS)
def test_what_is_not_the_identity_at_start_is_named(name: str) -> None:
    (section,) = re.findall(r"^## Which methods start as the identity\n(.*?)^## ", TEXT, re.MULTILINE | re.DOTALL)
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    # peft is an exception, because its properties depend on its config.
    assert (name in named) is (not ADAPTERS.load(OURS[name].target).identity_at_start or name == "peft")


@pytest.mark.parametrize("name", [name for name, entry in OURS.items() if ADAPTERS.load(entry.target).grouped])
def test_which_methods_can_be_merged(name: str) -> None:
    (section,) = re.findall(r"^## Merging\n(.*?)^## ", TEXT, re.MULTILINE | re.DOTALL)
    can, cannot = (re.findall(r"`(\w+)`", part) for part in section.partition("can be merged;")[::2])
    adapted = harness.adapt(tiny_llama(), {"method": name})
    if name in can:
        assert isinstance(adapted.merge(), LlamaForCausalLM)
    else:
        assert name in cannot
        with pytest.raises(harness.UserError, match="cannot be merged"):
            adapted.merge()


def test_every_known_architecture_is_named() -> None:
    (line,) = [line for line in TEXT.splitlines() if line.startswith("`gemma`")]
    assert re.findall(r"`(\w+)`", line) == sorted(FAMILIES)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(code, str(DOCUMENT), "exec"), {})  # our own document
    printed = re.fullmatch(r"(\d+) (\{.*\})\n", capsys.readouterr().out)
    assert printed
    total, by_group = printed.groups()
    # Expected: 2 layers, rank 8; q, o 32 → 32, k, v 32 → 16, gate and up 32 → 48, down 48 → 32.
    lora = 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert int(total) == 2 * lora
    assert json.loads(by_group.replace("'", '"')) == {"image": lora, "text": lora}
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "context_peft.json",
        "context_peft.safetensors",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = page if not path else (page.parent / path)
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("name", TASKS.entries())
def test_every_task_has_a_page_that_names_its_options(name: str) -> None:
    page = (ROOT / "docs" / "tasks" / f"{name}.md").read_text(encoding="utf-8")
    options = options_of(TASKS.load(TASKS.find(name).target).Config, check_defaults=False)
    assert [option.name for option in options if not re.search(rf"`{option.name}[`.]|{option.name}:", page)] == []
    assert f"docs/tasks/{name}.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_score_on_the_leaderboard_is_explained() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = [name for entry in METRICS.entries().values() for name in METRICS.load(entry.target).labels]
    assert [name for name in names if f"`{name}`" not in page] == []


# Rooms that the map describes as "one file per …".
LISTED_AS_A_WHOLE = {
    "adapters/methods", "tasks", "tasks/containers", "tasks/metrics", "tasks/metrics/coco", "tasks/modalities/encoders",
    "results/page/plots",
}  # fmt: skip


def test_the_map_of_the_house_has_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    house = text[text.index("harness/     the benchmark") : text.index("clusters/    ")]
    missing = [
        str(path.relative_to(ROOT))
        for package in ("harness", "adapters", "tasks", "results")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not path.stem.startswith("__") and str(path.parent.relative_to(ROOT)) not in LISTED_AS_A_WHOLE
        if not re.search(rf"\b{path.stem}\b", house)
    ]
    assert missing == []
