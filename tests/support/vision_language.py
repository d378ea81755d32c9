"""Vision-language models of every class that the harness takes, saved with random weights and a small processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Backbone
from harness.model import vision_language
from harness.model.build import Built, build
from harness.model.sharing import why_not_shared
from tasks.base import Example, Part
from tasks.drawing.scene import COLOURS
from tests.support.adapters import disturb
from tests.support.trials import spec_of

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
TOWER = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_LINES = ("\n\n", "\n\n\n")  # each one token, as Gemma's tokenizer has them
_PINPOINTS = [[16, 32], [32, 16], [32, 32]]
NONE = {"method": "none", "learning_rate": 1e-3}
PROMPT = "What is in the picture?"
CAPTIONS = ["a red circle", "a square and a blue circle", "yes"]
SQUARE = {"height": 16, "width": 16}
_SAID = ["A chat between a user and an assistant.", "What is in the picture? Describe it.", "ASSISTANT: USER: yes no"]
TURNS = (
    "{% for m in messages %}{{ m.role | upper }}: {% for part in m.content %}{% if part.type == 'image' %}"
    "PLACE{% else %}{{ '\n' + part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


class Kind(NamedTuple):
    """A class of models.

    Attributes:
        tokens: special ones, besides those that begin and end texts.
        model: makes one, of the tokenizer.
        processor: makes its processor, of the tokenizer; or its image processor and the options of a class whose
            processor needs torchvision for videos, which is not installed.
        place: what stands for a picture in the chat template.
    """

    tokens: tuple[str, ...]
    model: Callable[[Any], Any]
    processor: Callable[[Any], Any]
    place: str
    named: Mapping[str, str] = {}  # attributes of the tokenizer that are special tokens
    templated: bool = True


def tokenizer(tokens: Iterable[str], named: Mapping[str, str] | None = None, said: Iterable[str] = ()) -> Any:
    """A byte-level BPE of a few words, with the special tokens of a class.

    Args:
        tokens: special ones, besides those that begin and end texts.
        named: attributes that are special tokens.
        said: texts that it knows.
    """
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>", "<pad>"],
    )  # fmt: skip
    known = [*_SAID, *(f"a {colour} circle and a square" for colour in COLOURS)]
    own.train_from_iterator(said or known, trainer)
    own.add_tokens([AddedToken(token, normalized=False, special=not token.isspace()) for token in tokens])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=own,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=dict(named or {}),
    )


def _needs(name: str) -> list[pytest.MarkDecorator]:
    """Skips a class whose processor needs a library that is not installed."""
    library = {"mistral3": "torchvision", "smolvlm": "num2words"}.get(name)
    missing = library is not None and find_spec(library) is None
    return [pytest.mark.skipif(missing, reason=f"the processor of {name} needs {library}, which is not installed")]


def class_of(kind: str) -> vision_language.Kind:
    """How the harness reads a class."""
    return vision_language.KINDS[{"paligemma2": "paligemma"}.get(kind, kind)]  # the same on another language model


def each_kind(names: Iterable[str]) -> pytest.MarkDecorator:
    """A test of each class."""
    return pytest.mark.parametrize("kind", [pytest.param(name, marks=_needs(name)) for name in names])


def save(name: str, folder: Path, template: bool = True) -> Path:
    """Save a model of a class with its processor."""
    kind = KINDS[name]
    made = tokenizer(kind.tokens, kind.named)
    torch.manual_seed(0)
    model = kind.model(made).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.15)
    model.save_pretrained(folder)
    processor = kind.processor(made)
    turns = TURNS.replace("PLACE", kind.place) if template and kind.templated else None
    if not isinstance(processor, tuple):
        processor.chat_template = turns
        processor.save_pretrained(folder)
        return folder
    pixels, options = processor
    pixels.save_pretrained(folder)
    made.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(options))
    video = options["processor_class"].replace("Processor", "VideoProcessor")
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"video_processor_type": video}))
    if turns:
        (folder / "chat_template.jinja").write_text(turns)
    return folder


def make(tmp_path: Path, kind: str, adapter: Mapping[str, Any] = NONE, **backbone: Any) -> tuple[TrialSpec, Built]:
    """A trial's model on a saved one."""
    folder = tmp_path / kind
    if not folder.exists():
        save(kind, folder)
    spec = spec_of(tmp_path, adapter, backbone={"model": str(folder), **backbone})
    return spec, build(spec, torch.device("cpu"))


def picture(path: Path, width: int, height: int) -> Path:
    noise = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def read_by_its_processor(folder: Path, image: Path, prompt: str) -> Any:
    """The ids and pixels of a whole turn."""
    processor = vision_language.load_processor(Backbone(model=str(folder)))
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    turn = f"{processor.image_token}{prompt}"
    if processor.chat_template:
        turn = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    read = processor(images=[Image.open(image)], text=[turn], return_tensors="pt")
    read.pop("labels", None)
    return read


def nll_by_class(model: Any, folder: Path, image: Path, prompt: str, caption: str, **more: Any) -> Tensor:
    """The negative log likelihood of a caption by the class's own forward on what its processor makes of a picture."""
    read = read_by_its_processor(folder, image, prompt)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    target = [*tokenizer(caption, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    length = read["input_ids"].shape[1]
    ids = torch.cat([read["input_ids"], torch.tensor([target])], dim=1)
    extra = {name: x for name, x in read.items() if name not in ("input_ids", "attention_mask")}
    for name in {"mm_token_type_ids", "token_type_ids"} & set(extra):  # 1 for images, of PaliGemma for targets
        extra[name] = F.pad(extra[name], (0, len(target)), value=int("paligemma" in folder.name))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra, **more).logits[0, length - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(target), reduction="sum")


def pictures(folder: Path) -> list[Path]:
    sizes = ((44, 30), (30, 44), (20, 20))
    return [picture(folder / f"{n}.png", *size) for n, size in enumerate(sizes)]


def examples_of(paths: list[Path]) -> list[Example]:
    return [Example(str(n), (Part("image", path),), (CAPTIONS[n],)) for n, path in enumerate(paths)]


def assert_shared_rows_are_rows_alone(built: Built, examples: list[Example]) -> None:
    """Rows of several targets of one picture have the likelihoods of rows of one target each."""
    disturb(built.model.adapters.parameters())
    first, second, _ = examples
    built.model.eval()
    rows = [[(first, "a red circle"), (first, "yes")], [(second, "no"), (second, "a square")]]
    with torch.no_grad():
        shared_R, _ = built.model(built.batches.make_shared(rows))
        alone = [pair for row in rows for pair in row]
        alone_R, _ = built.model(built.batches.make([e for e, _ in alone], [text for _, text in alone]))
    torch.testing.assert_close(shared_R, alone_R, atol=1e-5, rtol=1e-5)
    assert why_not_shared(built.model, built.batches) is None


def _text(kind: str, made: Any, **options: Any) -> dict[str, Any]:
    return {"model_type": kind, "vocab_size": len(made), **_special(made), **TEXT, **options}


def _special(made: Any) -> dict[str, int]:
    return {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id}


def _id(made: Any, token: str) -> int:
    found: int = made.convert_tokens_to_ids(token)
    return found


def _llava(made: Any) -> Any:
    config = hf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER}, text_config=_text("llama", made),
        image_token_id=_id(made, "<image>"), vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=16,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _llava_processor(made: Any) -> Any:
    pixels = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE)
    return hf.LlavaProcessor(
        pixels, made, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


_IDEFICS_TOKENS = (
    "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip


def _idefics(config: Any, model: Any, tower: Mapping[str, Any]) -> Callable[[Any], Any]:
    def make(made: Any) -> Any:
        return model(
            config(
                vision_config=dict(tower), text_config=_text("llama", made), image_token_id=_id(made, "<image>"),
                scale_factor=2, pad_token_id=made.pad_token_id, tie_word_embeddings=False,
            )
        )  # fmt: skip

    return make


_TILES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}, "do_image_splitting": True}


def _idefics_processor(made: Any) -> Any:
    return hf.Idefics3Processor(hf.Idefics3ImageProcessorPil(**_TILES), made, image_seq_len=4)


def _smolvlm_processor(_: Any) -> Any:
    return hf.SmolVLMImageProcessorPil(**_TILES), {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}


def _internvl(made: Any) -> Any:
    tower = {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]}
    config = hf.InternVLConfig(
        vision_config={"model_type": "internvl_vision", **tower}, text_config=_text("qwen2", made),
        image_token_id=_id(made, "<IMG_CONTEXT>"), image_seq_length=4, downsample_ratio=0.5, vision_feature_layer=-1,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config)


def _internvl_processor(_: Any) -> Any:
    pixels = hf.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    return pixels, {"processor_class": "InternVLProcessor", "image_seq_length": 4}


def _mistral3(made: Any) -> Any:
    tower = {**TOWER, "model_type": "pixtral", "image_size": 24, "head_dim": 6}
    config = hf.Mistral3Config(
        vision_config=tower, text_config=_text("mistral", made, head_dim=8, sliding_window=None),
        image_token_id=_id(made, "[IMG]"), spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    return hf.Mistral3ForConditionalGeneration(config)


def _mistral3_processor(made: Any) -> Any:
    pixels = hf.PixtralImageProcessorPil(size={"longest_edge": 24}, patch_size={"height": 4, "width": 4})
    return hf.PixtralProcessor(pixels, made, patch_size=4, spatial_merge_size=2)


def _gemma3(made: Any) -> Any:
    text = _text("gemma3_text", made, head_dim=8, sliding_window=24, query_pre_attn_scalar=8)
    text |= {"layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True}
    config = hf.Gemma3Config(
        vision_config={**TOWER, "vision_use_head": False}, text_config=text, mm_tokens_per_image=4,
        image_token_id=_id(made, "<image_soft_token>"), boi_token_index=_id(made, "<start_of_image>"),
        eoi_token_index=_id(made, "<end_of_image>"),
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def _gemma3_processor(made: Any) -> Any:
    return hf.Gemma3Processor(hf.Gemma3ImageProcessorPil(size=SQUARE), made, image_seq_length=4)


def _paligemma(kind: str) -> Callable[[Any], Any]:
    def make(made: Any) -> Any:
        # Tied as the published ones; a small one on Gemma would repeat its last token.
        text = _text(kind, made, head_dim=8) | {"tie_word_embeddings": kind == "gemma2"}
        if kind == "gemma2":
            text |= {"sliding_window": 40, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
        config = hf.PaliGemmaConfig(
            vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}, text_config=text,
            image_token_index=_id(made, "<image>"), projection_dim=32, hidden_size=32,
            tie_word_embeddings=kind == "gemma2",
        )  # fmt: skip
        return hf.PaliGemmaForConditionalGeneration(config)

    return make


def _paligemma_processor(made: Any) -> Any:
    return hf.PaliGemmaProcessor(hf.SiglipImageProcessorPil(size=SQUARE, image_seq_length=16), made)


def _onevision(made: Any) -> Any:
    config = hf.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
        text_config=_text("qwen2", made), image_token_id=_id(made, "<image>"), video_token_id=_id(made, "<video>"),
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=_PINPOINTS,
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _onevision_processor(_: Any) -> Any:
    pixels = hf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=_PINPOINTS)
    options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return pixels, {"processor_class": "LlavaOnevisionProcessor", **options}


def _next(made: Any) -> Any:
    config = hf.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER}, text_config=_text("mistral", made),
        image_token_id=_id(made, "<image>"), vision_feature_layer=-2, image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


def _next_processor(made: Any) -> Any:
    pixels = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=_PINPOINTS
    )
    return hf.LlavaNextProcessor(
        pixels, made, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _qwen(config: Any, model: Any, tower: Mapping[str, Any]) -> Callable[[Any], Any]:
    def make(made: Any) -> Any:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        if config is hf.Qwen3VLConfig:
            rope |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
        text = _text("", made, rope_parameters=rope, head_dim=8)
        del text["model_type"]
        ids = {f"{name}_id": _id(made, f"<|{token}|>") for name, token in _QWEN_NAMES.items()}
        vision = {
            "depth": 2,
            "num_heads": 3,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **tower,
        }
        return model(config(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids))

    return make


_QWEN_NAMES = {
    "image_token": "image_pad", "video_token": "video_pad", "vision_start_token": "vision_start",
    "vision_end_token": "vision_end",
}  # fmt: skip
_QWEN_TOKENS = tuple(f"<|{name}|>" for name in _QWEN_NAMES.values())
_QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen_processor(named: str) -> Callable[[Any], Any]:
    def make(_: Any) -> Any:
        pixels = hf.Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2,
            size={"shortest_edge": 256, "longest_edge": 1024},
        )  # fmt: skip
        return pixels, {"processor_class": named}

    return make


KINDS = {
    "llava_next": Kind(("<image>",), _next, _next_processor, "<image>"),
    "qwen2_vl": Kind(
        _QWEN_TOKENS,
        _qwen(
            hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration, {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
        ),
        _qwen_processor("Qwen2VLProcessor"),
        _QWEN_PLACE,
    ),
    "qwen2_5_vl": Kind(
        _QWEN_TOKENS,
        _qwen(
            hf.Qwen2_5_VLConfig,
            hf.Qwen2_5_VLForConditionalGeneration,
            {
                "hidden_size": 24,
                "intermediate_size": 32,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        ),
        _qwen_processor("Qwen2_5_VLProcessor"),
        _QWEN_PLACE,
    ),
    "qwen3_vl": Kind(
        _QWEN_TOKENS,
        _qwen(
            hf.Qwen3VLConfig,
            hf.Qwen3VLForConditionalGeneration,
            {
                "hidden_size": 24,
                "intermediate_size": 32,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        ),
        _qwen_processor("Qwen3VLProcessor"),
        _QWEN_PLACE,
    ),
    "llava": Kind(("<image>",), _llava, _llava_processor, "<image>"),
    "idefics3": Kind(
        _IDEFICS_TOKENS,
        _idefics(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, TOWER),
        _idefics_processor,
        "<image>",
    ),
    "smolvlm": Kind(
        _IDEFICS_TOKENS,
        _idefics(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, TOWER),
        _smolvlm_processor,
        "<image>",
    ),
    "internvl": Kind(
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        _internvl,
        _internvl_processor,
        "<IMG_CONTEXT>",
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "gemma3": Kind(
        ("<start_of_image>", "<image_soft_token>", "<end_of_image>", *_LINES),
        _gemma3,
        _gemma3_processor,
        "{{ '\n' }}<start_of_image>",
        {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"},
    ),
    "paligemma": Kind(
        ("<image>",), _paligemma("gemma"), _paligemma_processor, "<image>", {"image_token": "<image>"}, False
    ),
    "paligemma2": Kind(
        ("<image>",), _paligemma("gemma2"), _paligemma_processor, "<image>", {"image_token": "<image>"}, False
    ),
    "mistral3": Kind(("[IMG]", "[IMG_BREAK]", "[IMG_END]"), _mistral3, _mistral3_processor, "[IMG]"),
    "llava_onevision": Kind(("<image>", "<video>"), _onevision, _onevision_processor, "<image>"),
}
