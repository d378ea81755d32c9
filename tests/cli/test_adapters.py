"""``harness adapters``: methods, their options, parameter counts without weights, broken plugins and wrong input."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, PositiveInt
from rich.console import Console

from adapters.base import AdapterMethod, Config
from adapters.registry import ADAPTERS
from harness.cli import app
from harness.cli.plugins import Option, options_of
from tests.support.cli import Harness, Outcome, assert_refused, caller
from tests.support.installed import replace_entry_points

TINY = ("--model", "builtin/tiny-llama")


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Harness:
    """Runs ``harness adapters …`` in this process, in an empty folder, on a console of 80 columns."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(app, "console", Console(width=80))

    run = caller(monkeypatch, capsys, "adapters")

    def call(*arguments: str | Path) -> Outcome:
        outcome = run(*arguments)
        assert list(Path.cwd().iterdir()) == []
        return outcome

    return call


def counts(text: str, name: str) -> list[str]:
    """The numbers at the end of the row of a name."""
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
    return re.split(r" {2,}", line.strip())[-2:]


def model_folder(path: Path, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def test_every_method_is_listed_with_every_option(adapters: Harness) -> None:
    outcome = adapters()
    assert (outcome.code, outcome.err) == (0, "")
    assert "cannot be used" not in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80
    paragraphs = re.split(r"^(?=\S)", outcome.out, flags=re.MULTILINE)[1:]
    assert [paragraph.split()[0] for paragraph in paragraphs] == list(ADAPTERS.entries())
    for paragraph, entry in zip(paragraphs, ADAPTERS.entries().values(), strict=True):
        method = ADAPTERS.load(entry.target)
        assert " ".join(paragraph.split()).startswith(f"{entry.name} {method.summary} ")
        assert re.findall(r"^    (\w+):", paragraph, re.MULTILINE) == [*method.Config.model_fields, "from"]
        assert f"from: {entry.origin}, {entry.target}" in paragraph
    assert "    dropout: number ≥ 0, < 1 (default 0.0)\n" in outcome.out


def test_one_method_in_detail(adapters: Harness) -> None:
    outcome = adapters("lora")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.rstrip() for line in outcome.out.splitlines()]
    assert lines[0] == f"lora  {ADAPTERS.load('adapters.methods.lora:LoRA').summary}"
    wrapped = re.sub(r"\n {10,}", " ", "\n".join(lines)).splitlines()
    rows = [re.split(r" {2,}", line.strip()) for line in wrapped if line.startswith("    ") and ": " not in line]
    assert rows == [
        [o.name, o.default, o.allowed] for o in options_of(ADAPTERS.load("adapters.methods.lora:LoRA").Config)
    ]
    assert ["rank", "8", "integer > 0"] in rows
    assert "    groups: one set of parameters per context group" in lines
    assert "    at start: equal to the base model" in lines
    assert "    groups: none; grouping is not supported" in adapters("full").out


class Everything(BaseModel):
    """Every kind of option a plugin may have."""

    size: PositiveInt
    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    limit: Annotated[int, Field(le=9000)] | None = None
    kind: Literal["a", "b"] = "a"
    only: Literal["c"] = "c"
    on: bool = True
    where: Literal["A"] | tuple[Literal["q", "k"], ...] = ("q",)
    more: dict[str, Any] = Field(default_factory=lambda: {"r": 8})
    any_value: Any = None


def test_options_are_read_from_the_types() -> None:
    assert options_of(Everything) == [
        Option("size", "integer > 0", "required"),
        Option("share", "number ≥ 0, < 1", "0.5"),
        Option("limit", "integer ≤ 9,000 or null", "null"),
        Option("kind", "a, b", "a"),
        Option("only", "c", "c"),
        Option("on", "true or false", "true"),
        Option("where", "A or a list of q, k", '["q"]'),
        Option("more", "a mapping", '{"r": 8}'),
        Option("any_value", "anything", "null"),
    ]


# tiny-llama: 4 layers; q, k, v, o at 96 → 96, gate and up 96 → 256, down 256 → 96.
LORA_RANK_1 = 4 * (4 * (96 + 96) + 3 * (96 + 256))
BITFIT = 4 * (5 * 96 + 2 * 256)


def test_parameters_of_every_method(adapters: Harness) -> None:
    outcome = adapters(*TINY)
    assert (outcome.code, outcome.err) == (0, "")
    assert "cannot be used" not in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert counts(outcome.out, "lora") == [f"{8 * LORA_RANK_1:,}", f"{16 * LORA_RANK_1:,}"]
    assert counts(outcome.out, "bitfit") == [f"{BITFIT:,}", f"{2 * BITFIT:,}"]
    assert counts(outcome.out, "ia3") == [f"{4 * (96 + 96 + 256):,}", f"{8 * (96 + 96 + 256):,}"]
    assert counts(outcome.out, "none") == ["0", "–"]
    assert counts(outcome.out, "full") == ["523,584", "–"]
    assert outcome.out.startswith("trainable parameters in builtin/tiny-llama, which has 523,584 parameters\n")
    heads = [line.split()[0] for line in outcome.out.splitlines()[2:]]
    assert heads == list(ADAPTERS.entries())


def test_parameters_by_role_for_other_options_and_contexts(adapters: Harness) -> None:
    arguments = ("--set", "rank=3", "--set", "where=[q, down]", "--contexts", "image, audio,text")
    outcome = adapters("lora+bitfit", *TINY, *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert "LoRA r=3 q,down + BitFit q,down: trainable parameters in builtin/tiny-llama" in outcome.out
    assert "specific (image, audio, text)" in outcome.out
    q, down = 4 * (3 * 192 + 96), 4 * (3 * 352 + 96)
    assert counts(outcome.out, "q") == [f"{q:,}", f"{3 * q:,}"]
    assert counts(outcome.out, "down") == [f"{down:,}", f"{3 * down:,}"]
    assert counts(outcome.out, "all") == [f"{q + down:,}", f"{3 * (q + down):,}"]


def test_an_option_goes_to_the_methods_that_have_it(adapters: Harness) -> None:
    outcome = adapters(*TINY, "--set", "rank=2", "--set", "dropout=1e-1")
    assert counts(outcome.out, "lora") == [f"{2 * LORA_RANK_1:,}", f"{4 * LORA_RANK_1:,}"]
    assert counts(outcome.out, "bitfit") == [f"{BITFIT:,}", f"{2 * BITFIT:,}"]


def test_table_3_of_the_paper(adapters: Harness, tmp_path: Path) -> None:
    folder = model_folder(
        tmp_path / "glm", model_type="glm", hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, head_dim=64, intermediate_size=3072, vocab_size=50272, pad_token_id=1,
    )  # fmt: skip
    out = adapters("--model", folder, "--set", "rank=1").out
    assert counts(out, "ia3") == ["55,296", "110,592"]
    assert counts(out, "bitfit") == ["119,808", "239,616"]
    assert counts(out, "lora") == ["202,752", "405,504"]
    for rank, expected in ((8, ["1,622,016", "3,244,032"]), (64, ["12,976,128", "25,952,256"])):
        assert counts(adapters("lora", "--model", folder, "--set", f"rank={rank}").out, "all") == expected


def test_a_method_that_does_not_fit_the_model_says_why(adapters: Harness, tmp_path: Path) -> None:
    outcome = adapters("--model", "facebook/opt-125m", "--set", "where=[gate]")
    assert outcome.code == 0
    reason = "opt model has no layer with"
    assert re.search(rf"^bitfit, .*lora.*  cannot be used: .*{reason}", outcome.out, re.MULTILINE)
    assert counts(outcome.out, "full") == ["125,239,296", "–"]
    assert_refused(adapters("lora", "--model", "facebook/opt-125m", "--set", "where=[gate]"), reason)

    sizes = {"hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    rwkv = model_folder(tmp_path / "rwkv", model_type="rwkv", **sizes)
    outcome = adapters("--model", rwkv)
    assert len(re.findall("cannot be used: language model of type 'rwkv':", outcome.out)) == 1
    assert "… (harness adapters METHOD shows the rest)" in outcome.out
    assert counts(outcome.out, "full") == ["120,960", "–"]
    assert_refused(adapters("lora", "--model", rwkv), "rwkv.blocks.*.attention.key")


class WithoutLabel(AdapterMethod):
    """Imports, and fails when it is used."""

    summary = "a label [bold] is missing"
    Config = Config

    def label(self) -> str:
        raise ValueError("no label\nfor this")


class WithoutConfig(AdapterMethod):
    """Has an invalid ``Config``."""

    summary = "options that are none"
    Config = None  # type: ignore[assignment]

    def label(self) -> str:
        return "any"


@pytest.fixture
def _broken_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed(EntryPoint):
        dist = SimpleNamespace(name="theirs", version="2.0")  # type: ignore[assignment]

    targets = {
        "absent": "no_such_module:Any",
        "bitfit": "adapters.methods.bitfit:BitFit",
        "configless": f"{__name__}:WithoutConfig",
        "label": f"{__name__}:WithoutLabel",
        "stranger": "pathlib:Path",
    }
    points = [Installed(name, target, "harness.adapters") for name, target in targets.items()]
    replace_entry_points(monkeypatch, lambda group: [p for p in points if p.group == group])


BROKEN = {
    "absent": "adapter no_such_module:Any: cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
    "configless": f"{__name__}:WithoutConfig: AttributeError: 'NoneType' object has no attribute 'model_",
    "stranger": "adapter pathlib:Path: must be a subclass of adapters.base.AdapterMethod",
}


@pytest.mark.usefixtures("_broken_plugins")
def test_a_broken_plugin_takes_one_line_and_does_not_affect_others(adapters: Harness) -> None:
    listed = adapters()
    assert (listed.code, listed.err) == (0, "")
    assert re.findall(r"^(\w+)  ", listed.out, re.MULTILINE) == ["absent", "bitfit", "configless", "label", "stranger"]
    for name, reason in BROKEN.items():
        (line,) = [line for line in listed.out.splitlines() if line.startswith(f"{name}  ")]
        assert line.startswith(f"{name}  cannot be used: {reason}")

    assert "\nlabel  a label [bold] is missing" in listed.out

    counted = adapters(*TINY)
    assert (counted.code, counted.err) == (0, "")
    assert counts(counted.out, "bitfit") == [f"{BITFIT:,}", f"{2 * BITFIT:,}"]
    for name, reason in BROKEN.items():
        assert f"\n{name}  cannot be used: {reason}" in counted.out
    assert f"\nlabel  cannot be used: {__name__}:WithoutLabel: ValueError: no label … (harness" in counted.out
    assert_refused(adapters("absent"), BROKEN["absent"])


def test_a_library_that_is_not_installed_is_named(adapters: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    reason = "this needs the peft library: pip install 'context-peft-harness[peft]'"
    assert f"\npeft  cannot be used: {reason}" in adapters().out
    assert f"\npeft  cannot be used: {reason}" in adapters(*TINY).out
    assert_refused(adapters("peft"), reason)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("loar",), "unknown adapter 'loar'; allowed: "),
        (("loar",), "; did you mean 'lora'?"),
        (("lora+bitfti",), "did you mean 'bitfit'?"),
        (("lora", "--model", "builtin/tiny-lama"), "did you mean 'builtin/tiny-llama'?"),
        (("--model", "builtin/tiny-vision"), "'builtin/tiny-vision' is not a built-in language model"),
        (("--model", "./nowhere"), "'./nowhere': no such folder"),
        (("lora", "--set", "rank=2"), "--set rank=2: options are used to count parameters, which needs --model"),
        (("lora", *TINY, "--set", "rank"), "--set rank: found no '='; expected OPTION=VALUE, such as rank=64"),
        (("lora", *TINY, "--set", "rank=[1"), "--set rank=[1: '[1' is not valid YAML"),
        (("lora", *TINY, "--set", "rank=0"), "--set.rank: input should be greater than 0; found 0"),
        (("lora", *TINY, "--set", "rank=97"), "rank 97 is larger than layer model.layers.0.self_attn.q_proj"),
        (("lora", *TINY, "--set", "rank='4'"), "--set.rank: input should be a valid integer; found '4'"),
        (("lora", *TINY, "--set", "rnk=4"), "--set.rnk: unknown key 'rnk'; allowed: alpha, "),
        ((*TINY, "--set", "rnk=4"), "--set rnk: no adapter has this option; allowed: "),
        ((*TINY, "--set", "rnk=4"), "did you mean 'rank'?"),
        ((*TINY, "--contexts", "image,image"), "--contexts image,image: allowed: different names"),
        ((*TINY, "--contexts", "image,"), "--contexts image,: allowed: different names"),
    ],
)
def test_wrong_input_is_refused(adapters: Harness, arguments: tuple[str, ...], says: str) -> None:
    assert_refused(adapters(*arguments), says)
