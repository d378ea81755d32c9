"""What a vision- or audio-language model reads before a target: the inputs of an example as a turn of the user.

The text is that of the processor's chat template, and it is tokenised as the processor does it: as a whole, because a
token may reach over the end of an input. A token belongs to the input in which it begins, else to the target's context.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.core.errors import UserError
from harness.experiment.sections import Backbone
from harness.model import vision_language
from tasks.base import Part

_PLACE, _TEXT = "\x02file\x02", "\x02{}\x02"
_MARK = re.compile("\x02(file|[0-9]+)\x02")


class Piece(NamedTuple):
    """Consecutive tokens of a turn, or a picture or recording.

    Attributes:
        input: number of the example's input that it is of; None: of the template, or the prompt.
        ids: of the tokens; None: a picture or recording.
    """

    input: int | None
    ids: list[int] | None


class Turn:
    """How a model's processor writes the inputs of examples.

    Args:
        processor: of the model.
        backbone: for ``prompt`` and ``chat_template``.

    Raises:
        UserError: the template leaves something out, or what is assembled is not what the processor makes of it.
    """

    def __init__(self, processor: Any, backbone: Backbone) -> None:
        self.processor, self.tokenizer, self._backbone = processor, processor.tokenizer, backbone
        self._kind, _ = vision_language.kind_of(backbone)
        self._place = getattr(processor, self._kind.place)
        self._around = self._kind.around(processor)
        self._templated = backbone.chat_template
        if self._templated is None:
            self._templated = bool(processor.chat_template)
        if backbone.start_token is not None:
            raise UserError(
                "backbone.start_token: found with backbone.model, whose processor begins rows itself; leave it out"
            )
        if self._templated and not processor.chat_template:
            raise UserError(
                f"backbone.chat_template: the processor of {backbone.model!r} has no chat template; allowed: false"
            )
        self._known: dict[tuple[bool, ...], str] = {}  # which inputs are files → what is given, with marks
        self._check()

    def pieces(self, inputs: Sequence[Part], texts: Sequence[str]) -> list[Piece]:
        """The pieces of a turn.

        Args:
            inputs: of an example.
            texts: of the inputs that are no pictures, in order.
        """
        return self._pieces(tuple(isinstance(part.value, Path) for part in inputs), texts)

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text that has at most so many tokens."""
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if len(read["input_ids"]) <= tokens:
            return text
        return text[: read["offset_mapping"][tokens - 1][1]]

    def _pieces(self, pictures: tuple[bool, ...], texts: Sequence[str]) -> list[Piece]:
        found: list[Piece] = []
        before, after = self._around
        rest = iter(texts)
        written, spans = "", list[tuple[int, int, int]]()  # the text since the last picture, and where its inputs are
        first, last = True, 0
        turn = self._turn(pictures)
        for mark in _MARK.finditer(turn):
            written += turn[last : mark.start()]
            last = mark.end()
            if mark[1] == "file":
                number = _nth(pictures, len([piece for piece in found if piece.ids is None]))
                found += self._tokens(written + before, [*spans, _span(written, before, number)], first)
                found.append(Piece(number, None))
                written, spans, first = after, [_span("", after, number)], False
            else:
                text = next(rest)
                spans.append(_span(written, text, int(mark[1])))
                written += text
        return [*found, *self._tokens(written + turn[last:], spans, first)]

    def _tokens(self, text: str, spans: Sequence[tuple[int, int, int]], first: bool) -> list[Piece]:
        """The tokens of a text, by the input in which they begin."""
        if not text and not first:
            return []
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        found: list[Piece] = [Piece(None, self._start(text))] if first else []
        for token, (start, _) in zip(read["input_ids"], read["offset_mapping"], strict=True):
            owner = next((number for begin, end, number in spans if begin <= start < end), None)
            if found and found[-1].input == owner and found[-1].ids is not None:
                found[-1].ids.append(token)
            else:
                found.append(Piece(owner, [token]))
        return [piece for piece in found if piece.ids != []]

    def _start(self, text: str) -> list[int]:
        """What the tokenizer puts before a text, if the template has not begun it."""
        if self._begun(text):
            return []
        plain: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole: list[int] = self.tokenizer("a")["input_ids"]
        return whole[: next(n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)]

    def _begun(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)

    def _turn(self, pictures: tuple[bool, ...]) -> str:
        """The turn of inputs of these kinds as it is tokenised, with a mark at the place of each."""
        return self._kind.completed(self.processor, self._asked(pictures), _PLACE)

    def _asked(self, pictures: tuple[bool, ...]) -> str:
        """What the processor is given for it."""
        if pictures not in self._known:
            marks = [_PLACE if picture else _TEXT.format(n) for n, picture in enumerate(pictures)]
            prompt = self._backbone.prompt or ""
            turn = self._rendered(marks, prompt) if self._templated else "".join(marks) + prompt
            found = [mark[0] for mark in _MARK.finditer(turn)]
            if sorted(found) != sorted(marks) or [m for m in found if m != _PLACE] != [m for m in marks if m != _PLACE]:
                raise UserError("backbone.chat_template: the template changes or leaves out the turn of the user")
            self._known[pictures] = turn
        return self._known[pictures]

    def _rendered(self, marks: Sequence[str], prompt: str) -> str:
        what = self._kind.medium.modality
        content = [{"type": what} if mark == _PLACE else {"type": "text", "text": mark} for mark in marks]
        content += [{"type": "text", "text": prompt}] if prompt else []
        try:
            turn = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template raises what its author wrote
            raise UserError(f"backbone.chat_template: {' '.join(str(error).split())}") from error
        return str(turn).replace(self._place, _PLACE)

    def _check(self) -> None:
        """Compare what is assembled with what the processor makes of the same turn, on a blank item.

        Raises:
            UserError: they differ.
        """
        pictures, texts = (True, False), ["What is on the table?"]
        turn = self._asked(pictures)
        text = turn.replace(_PLACE, self._place).replace(_TEXT.format(1), texts[0])
        special = not self._begun(text)
        medium = self._kind.medium
        item = medium.blank()

        def read(own: str, add_special_tokens: bool) -> list[int]:
            made = medium.read(self.processor, [item], own, add_special_tokens=add_special_tokens)
            return [int(token) for token in made["input_ids"][0]]

        try:
            expected = read(text, special)
            image = self._kind.item_in(self.processor, read(self._place, False))
        except Exception as error:  # processors raise anything
            raise UserError(
                f"backbone.model: the processor of {self._backbone.model!r} cannot read {medium.named}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        found = [token for piece in self._pieces(pictures, texts) for token in (piece.ids or image)]
        if found != expected:
            at = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
            raise UserError(
                f"backbone.model: {self._backbone.model!r}: its processor writes {len(expected)} tokens for "
                f"{medium.named} and a question, the harness {len(found)}, which differ at position {at}: rows would "
                "not be those of the model"
            )


def _span(written: str, text: str, number: int) -> tuple[int, int, int]:
    """Where a text of an input is that follows what is written."""
    return len(written), len(written) + len(text), number


def _nth(pictures: Sequence[bool], n: int) -> int:
    """The number of the input that is picture ``n``."""
    return [number for number, picture in enumerate(pictures) if picture][n]
