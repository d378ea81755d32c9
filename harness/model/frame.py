"""The tokens around the inputs of a row: ``[start] inputs [prompt]`` or the turns of a chat template, then the target.

They belong to the context of the target, and have no loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from harness.core.errors import UserError, did_you_mean
from harness.experiment.sections import Backbone

_INPUTS = "\x02inputs\x02"  # stands for the inputs while the template is applied


class Frame(NamedTuple):
    """Token ids before the inputs, and between them and the target."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.before) + len(self.after)


def frame_of(tokenizer: Any, backbone: Backbone) -> Frame:
    """The frame of a tokenizer's rows, as ``start_token``, ``prompt`` and ``chat_template`` ask for.

    Raises:
        UserError: the start token is not in the vocabulary, or the tokenizer has no chat template that takes a turn of
            the user.
    """
    prompt = backbone.prompt or ""
    if not backbone.chat_template:
        return Frame((_start(tokenizer, backbone),), tuple(_ids(tokenizer, prompt)))
    if backbone.start_token is not None:
        raise UserError("backbone.start_token: found with chat_template, which begins rows itself; leave one out")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"backbone.chat_template: the tokenizer of {backbone.language_model!r} has no chat template; allowed: a "
            "model with one, or false"
        )
    turn = [{"role": "user", "content": _INPUTS + prompt}]
    try:
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template raises what its author wrote
        raise UserError(f"backbone.chat_template: {' '.join(str(error).split())}") from error
    before, found, after = text.partition(_INPUTS)
    if not found:
        raise UserError("backbone.chat_template: the template changes or leaves out the turn of the user")
    return Frame(tuple(_ids(tokenizer, before)), tuple(_ids(tokenizer, after)))


def _start(tokenizer: Any, backbone: Backbone) -> int:
    """The token that begins a row; for models without a BOS token (Qwen2), their end-of-text token."""
    if backbone.start_token is None:
        return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if backbone.start_token not in vocabulary:
        known = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        raise UserError(
            f"backbone.start_token: {backbone.start_token!r} is not a token of {backbone.language_model!r}; "
            f"{did_you_mean(backbone.start_token, known)}"
        )
    return int(vocabulary[backbone.start_token])


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return ids
