"""Registry: plugins and built-ins from entry points, plugin files, and the errors of invalid plugins."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapters.registry import ADAPTERS
from harness.core.errors import UserError, did_you_mean
from harness.core.registry import Entry, Registry, add_file
from tasks.registry import METRICS, MODALITIES, TASKS
from tests.support.installed import replace_entry_points

pytestmark = pytest.mark.quick


class Installed(EntryPoint):
    """An entry point of a distribution that is not installed."""

    def __init__(self, name: str, value: str, distribution: str | None) -> None:
        super().__init__(name, value, "harness.adapters")
        vars(self)["dist"] = SimpleNamespace(name=distribution, version="1.2") if distribution else None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """What ``entry_points`` finds."""
    points: list[EntryPoint] = []
    replace_entry_points(monkeypatch, lambda group: [p for p in points if p.group == group])
    return points


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            TASKS,
            {
                "audio_captions": "tasks.audio_captions:AudioCaptions",
                "coco_captions": "tasks.captioning:CocoCaptions",
                "mixture": "tasks.mixture:Mixture",
                "scenes": "tasks.scenes:Scenes",
                "speech": "tasks.speech:Speech",
                "text": "tasks.text:Text",
                "trends": "tasks.trends:Trends",
                "vqa": "tasks.vqa:VQA",
            },
        ),
        (
            ADAPTERS,
            {
                "bitfit": "adapters.methods.bitfit:BitFit",
                "bottleneck": "adapters.methods.bottleneck:Bottleneck",
                "dora": "adapters.methods.dora:DoRA",
                "full": "adapters.methods.baselines:Full",
                "ia3": "adapters.methods.ia3:IA3",
                "llava": "adapters.methods.llava:LLaVA",
                "ln_tuning": "adapters.methods.ln_tuning:LNTuning",
                "lora": "adapters.methods.lora:LoRA",
                "mmca": "adapters.methods.mmca:MMCA",
                "moka": "adapters.methods.moka:MokA",
                "none": "adapters.methods.baselines:NoAdapter",
                "peft": "adapters.methods.peft_bridge:PeftBridge",
                "soft_prompt": "adapters.methods.soft_prompt:SoftPrompt",
                "vera": "adapters.methods.vera:VeRA",
            },
        ),
        (
            MODALITIES,
            {
                "audio": "tasks.modalities.audio:Audio",
                "image": "tasks.modalities.image:Image",
                "series": "tasks.modalities.series:Series",
            },
        ),
        (
            METRICS,
            {
                "captions": "tasks.metrics.captions:CaptionMetrics",
                "diversity": "tasks.metrics.diversity:Diversity",
                "error_rate": "tasks.metrics.error_rate:ErrorRate",
                "exact_match": "tasks.metrics.exact_match:ExactMatch",
                "rouge": "tasks.metrics.rouge:Rouge",
                "vqa_accuracy": "tasks.metrics.vqa_accuracy:VQAAccuracy",
            },
        ),
    ],
    ids=["tasks", "adapters", "modalities", "metrics"],
)
def test_the_built_ins_come_from_entry_points(kind: Registry, expected: dict[str, str]) -> None:
    ours = {n: e for n, e in kind.entries().items() if e.origin.startswith("context-peft-harness ")}
    assert {name: entry.target for name, entry in ours.items()} == expected
    for name, target in expected.items():
        assert kind.find(name).name == name
        assert kind.load(target).__name__ == target.rpartition(":")[2]


def test_without_entry_points_there_are_no_built_ins(installed: list[EntryPoint]) -> None:
    assert ADAPTERS.entries() == {}
    with pytest.raises(UserError, match="unknown adapter 'lora'; allowed: nothing"):
        ADAPTERS.find("lora")


def test_an_unknown_name_offers_the_nearest() -> None:
    message = r"^grid\.yaml, line 3: unknown adapter 'loar'; allowed: bitfit, .*, vera; did you mean 'lora'\?$"
    with pytest.raises(UserError, match=message):
        ADAPTERS.find("loar", "grid.yaml, line 3")
    with pytest.raises(UserError, match=r"^unknown task 'zzz'; allowed: audio_captions, .*, vqa$"):
        TASKS.find("zzz")


def test_names_joined_by_plus_are_one_combination() -> None:
    plugins = ADAPTERS.plugins("lora+bitfit")
    assert [plugin.id for plugin in plugins] == ["context-peft-harness:lora@1", "context-peft-harness:bitfit@1"]
    combined = ADAPTERS.load(*(plugin.target for plugin in plugins))
    assert set(combined.Config.model_fields) == {*ADAPTERS.load(plugins[0].target).Config.model_fields, "where"}
    with pytest.raises(UserError, match=r"^here: unknown adapter 'bitfti'; allowed: .*did you mean 'bitfit'\?$"):
        ADAPTERS.find_all("lora+bitfti", "here")
    with pytest.raises(UserError, match=r"each method once; found LoRA\+LoRA$"):
        ADAPTERS.load(*(entry.target for entry in ADAPTERS.find_all("lora+lora")))
    with pytest.raises(UserError, match=r"^unknown task 'scenes\+scenes'; allowed: "):
        TASKS.find_all("scenes+scenes")
    with pytest.raises(UserError, match=r"^task tasks\.scenes:Scenes \+ tasks\.text:Text: cannot be combined$"):
        TASKS.load("tasks.scenes:Scenes", "tasks.text:Text")


def test_a_plugin_of_another_distribution_is_listed_with_the_rest(installed: list[EntryPoint]) -> None:
    installed += [
        Installed("vera", "vera.plugin:Vera", "vera-plugin"),
        Installed("lora", "adapters.methods.lora:LoRA", "ours"),
        Installed("local", "local:Local", None),
    ]
    assert list(ADAPTERS.entries().values()) == [
        Entry("local", "local:Local", "unknown distribution"),
        Entry("lora", "adapters.methods.lora:LoRA", "ours", "1.2"),
        Entry("vera", "vera.plugin:Vera", "vera-plugin", "1.2"),
    ]
    assert ADAPTERS.find("vera").origin == "vera-plugin 1.2"


def test_two_distributions_may_not_share_a_name(installed: list[EntryPoint]) -> None:
    installed += [
        Installed("lora", "adapters.methods.lora:LoRA", "ours"),
        Installed("lora", "fast.lora:LoRA", "fast-lora"),
    ]
    message = (
        "adapter 'lora' is registered twice: adapters.methods.lora:LoRA by ours 1.2 and fast.lora:LoRA by fast-lora "
        "1.2; "
        "uninstall one or rename it"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        ADAPTERS.find("lora")


def test_the_same_class_found_twice_is_one_entry(installed: list[EntryPoint]) -> None:
    # An editable installation beside a stale one lists its entry points twice.
    installed += [
        Installed("lora", "adapters.methods.lora:LoRA", "ours"),
        Installed("lora", "adapters.methods.lora:LoRA", "ours"),
    ]
    assert list(ADAPTERS.entries()) == ["lora"]


@pytest.fixture
def _plugin_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_plugin.py").write_text(
        "class NoAdapterAtAll: ...\ndef function(): ...\nclass Fine:\n    pass\n", encoding="utf-8"
    )
    (tmp_path / "broken_plugin.py").write_text("import a_module_nobody_has\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("wrong_plugin", "broken_plugin"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "wrong_plugin:NoAdapterAtAll",
            "wrong_plugin:NoAdapterAtAll: must be a subclass of adapters.base.AdapterMethod",
        ),
        ("wrong_plugin:function", "wrong_plugin:function: must be a subclass of adapters.base.AdapterMethod"),
        ("tasks.scenes:Scenes", "tasks.scenes:Scenes: must be a subclass of adapters.base.AdapterMethod"),
        (
            "wrong_plugin:Missing",
            "wrong_plugin:Missing: cannot be imported: AttributeError: module 'wrong_plugin'",
        ),
        ("wrong_plugin", "adapter wrong_plugin: cannot be imported"),
        (
            "broken_plugin:LoRA",
            "broken_plugin:LoRA: cannot be imported: ModuleNotFoundError: No module named 'a_mod",
        ),
        (
            "no_such_module:LoRA",
            "no_such_module:LoRA: cannot be imported: ModuleNotFoundError: No module named 'no_",
        ),
    ],
)
@pytest.mark.usefixtures("_plugin_modules")
def test_an_invalid_plugin_is_an_error_with_its_target(target: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ADAPTERS.load(target)


@pytest.mark.usefixtures("_plugin_modules")
def test_listing_imports_no_plugin(installed: list[EntryPoint]) -> None:
    installed.append(Installed("broken", "broken_plugin:LoRA", "broken"))
    assert ADAPTERS.find("broken").target == "broken_plugin:LoRA"
    assert "broken_plugin" not in sys.modules


def test_did_you_mean_suggests_no_distant_name() -> None:
    assert did_you_mean("qqq", ["lora", "ia3"]) == "allowed: ia3, lora"
    assert did_you_mean("lorra", ["lora", "ia3"]) == "allowed: ia3, lora; did you mean 'lora'?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import json\nx = json.loads('{')\n", r"JSONDecodeError: .* \({}:2\)"),
        ("import sys\n\nsys.exit(2)\n", r"SystemExit: 2 \({}:3\)"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--nope'])\n", r"SystemExit: 2 \({}:2\)"),
        ("class A:\nx\n", r"IndentationError: .* \(mine\.py, line 2\)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (path := tmp_path / "mine.py").write_text(text, encoding="utf-8")
    says = message.format(re.escape(str(path)))
    with pytest.raises(UserError, match=f"cannot be imported: {says}"):
        add_file(path, "plugins", [ADAPTERS])
    with pytest.raises(UserError, match=f"cannot be imported: {says}"):
        ADAPTERS.load(f"{path}:Mine")
