"""The tokens around the inputs of a row: a start token, a prompt, the turns of a chat template."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from harness.core.errors import UserError
from harness.experiment.sections import Backbone, Budget
from harness.model.backbones import load_language_model
from harness.model.batches import BatchMaker
from harness.model.features import Features
from harness.model.frame import Frame, frame_of
from tasks.base import Example, Split, Task

WORDS = ["<unk>", "<s>", "</s>", "<user>", "<end>", "<helper>", "describe", "it", "a", "cup", "of", "tea"]
TEMPLATE = "{% for m in messages %}<s> <user> {{ m.content }} <end>{% endfor %} <helper>"


def tokenizer(template: str | None = TEMPLATE) -> Any:
    own = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    found.chat_template = template
    return found


def ids(text: str) -> tuple[int, ...]:
    return tuple(WORDS.index(word) for word in text.split())


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({}, "<s>", ""),
        ({"start_token": "<end>"}, "<end>", ""),
        ({"prompt": "describe it"}, "<s>", "describe it"),
        ({"chat_template": True}, "<s> <user>", "<end> <helper>"),
        ({"chat_template": True, "prompt": " describe it"}, "<s> <user>", "describe it <end> <helper>"),
    ],
)
def test_a_frame_is_what_was_asked_for(options: dict[str, Any], before: str, after: str) -> None:
    assert frame_of(tokenizer(), Backbone(**options)) == Frame(ids(before), ids(after))


def test_wrong_frames_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"backbone.start_token: '</ss>' is not a token of .*did you mean '</s>'"):
        frame_of(tokenizer(), Backbone(start_token="</ss>"))
    with pytest.raises(UserError, match="start_token: found with chat_template, which begins rows itself"):
        frame_of(tokenizer(), Backbone(start_token="<s>", chat_template=True))
    with pytest.raises(UserError, match="the tokenizer of 'builtin/tiny-llama' has no chat template"):
        frame_of(tokenizer(None), Backbone(chat_template=True))
    with pytest.raises(UserError, match=r"backbone\.chat_template: no user here"):
        frame_of(tokenizer("{{ raise_exception('no user here') }}"), Backbone(chat_template=True))
    with pytest.raises(UserError, match="the template changes or leaves out the turn of the user"):
        frame_of(tokenizer("<s>"), Backbone(chat_template=True))


def test_unset_keys_change_no_id() -> None:
    assert not {"start_token", "prompt", "chat_template"} & Backbone().model_dump().keys()
    assert Backbone(prompt="it").model_dump()["prompt"] == "it"


class Questions(Task):
    contexts, modalities, metrics = ("question", "answer"), {}, ()

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    def prepare(self) -> None: ...

    def examples(self, split: Split) -> list[Example]:
        raise NotImplementedError


def test_rows_have_the_frame_in_training_and_generation() -> None:
    language_model = load_language_model(Backbone())
    features = Features(Questions(None), {}, {}, torch.device("cpu"))
    batches = BatchMaker(features, language_model, Budget(), Backbone(prompt=" so", start_token="<|eos|>"))
    example = Example("1", {"question": "what is it?"}, (" tea",))  # type: ignore[arg-type]
    own = language_model.tokenizer
    question, prompt, answer = (own(text)["input_ids"] for text in ("what is it?", " so", " tea"))
    start, end = own.eos_token_id, own.eos_token_id
    batch = batches.make([example], [" tea"])
    assert batch.token_ids_BT[0].tolist() == [start, *question, *prompt, *answer, end]
    assert batch.context_ids_BT[0].tolist() == [1, *[0] * len(question), *[1] * (len(prompt) + len(answer) + 1)]
    assert batch.targets.label_N.tolist() == [*answer, end], "the prompt has no loss"
    assert batches.prompts([example]).token_ids_BT[0].tolist() == [start, *question, *prompt]
    assert batches.text_positions(example, " tea") == batch.token_ids_BT.shape[1]


@pytest.mark.real_data
@torch.no_grad()
def test_a_start_token_matters_to_a_pretrained_model() -> None:
    """SmolLM2-Instruct's bos_token is ``<|im_start|>``, after which its pretraining never had plain text."""
    models_folder, captions = os.environ.get("REAL_MODELS"), os.environ.get("COCO_CAPTIONS")
    if not (models_folder and captions):
        pytest.skip("REAL_MODELS or COCO_CAPTIONS is not set")
    folder = f"{models_folder}/smollm2/fp32"
    model, own = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = json.loads(Path(captions).read_text(encoding="utf-8"))["annotations"][:24]
    perplexity = {}
    for token in (None, "<|endoftext|>"):
        ((start,), _) = frame_of(own, Backbone(start_token=token))
        nll = tokens = 0.0
        for row in rows:
            ids_T = torch.tensor([start, *own(row["caption"].strip())["input_ids"]])
            logits_TV = model(ids_T[None, :-1]).logits[0]
            nll += float(F.cross_entropy(logits_TV, ids_T[1:], reduction="sum"))
            tokens += len(ids_T) - 1
        perplexity[token] = math.exp(nll / tokens)
    assert perplexity["<|endoftext|>"] < 0.8 * perplexity[None], perplexity
