"""JSON Lines of conversations and instructions → turns and answers; see ``tasks/text.py`` for the three forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import ProblemList, UserError, did_you_mean
from tasks.containers.text_files import looks_like, read_utf8, unicode_problem
from tasks.formats.json_file import unique_keys

ROLES = ("system", "user", "assistant")
Turn = tuple[str, str]  # role, text
# The key that identifies a form → an example of the form.
_FORMS = {
    "messages": '{"messages": [{"role": …, "content": …}, …]}',
    "instruction": '{"instruction": …, "input": …, "output": …}',
    "prompt": '{"prompt": …, "completion": …}',
}
_NEEDED = {"messages": ("messages",), "instruction": ("instruction", "output"), "prompt": ("prompt", "completion")}
# Forms that are not read: the keys that identify one → its name and what to write instead.
_OTHER_FORMS = {
    ("conversations",): "ShareGPT's (from, value); write messages with role (user, assistant) and content",
    ("chosen", "rejected"): "a preference pair; write the chosen answer as completion, or as messages",
    ("question", "answer"): "a question and its answer; write prompt and completion, or instruction and output",
    ("prompt", "response"): "a prompt and its response; name the answer completion",
    ("instruction", "response"): "Dolly's (instruction, context, response); name them instruction, input and output",
    ("inputs", "targets"): "FLAN's (inputs, targets); name them prompt and completion",
    ("text",): "plain text to continue; write prompt and completion",
}
# What changes the meaning of a line where it is filled, and is not read → what to write instead.
_UNREAD = {
    **dict.fromkeys(("system", "system_prompt"), "write messages that begin with a system message"),
    "history": "write messages that begin with the earlier turns",
    **dict.fromkeys(("tools", "documents"), "write what the model shall see of them as a system message"),
}
_UNREAD_OF_MESSAGE = ("tool_calls", "function_call")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One line: the turns before the answer, and the answer with other acceptable ones."""

    id: str
    turns: tuple[Turn, ...]
    references: tuple[str, ...]
    verbatim: bool  # prompt and completion are concatenated unchanged: no template


def read_lines(path: Path, name: str, problems: ProblemList) -> list[Conversation]:
    """Read one file; blank lines are skipped; a byte order mark, CRLF, UTF-16 and gzip are accepted.

    Args:
        name: the file's path below the root; the id of a line is ``name:number``, counted from 1.
        problems: receives what is wrong with a line, with its number.

    Returns:
        The valid lines, in order.
    """
    try:
        data = read_utf8(path)
    except UserError as error:
        problems.add(error)
        return []
    if data.lstrip().startswith(b"["):
        problems.add(f"{path}: is a JSON array; one object per line is needed (`jq -c '.[]'` writes them)")
        return []
    found: list[Conversation] = []
    known = len(problems.messages)
    for number, raw in enumerate(data.split(b"\n"), 1):  # nothing else ends a line: a text may contain U+2028
        if not raw.strip():
            continue
        conversation = _Line(f"{path}: line {number}", problems).read(raw, f"{name}:{number}")
        if conversation is not None:
            found.append(conversation)
    if not found and len(problems.messages) == known:
        problems.add(f"{path}: the file has no lines; at least one is needed")
    return found


def clusters(lines: Sequence[Conversation]) -> list[str]:
    """For each line the id of the first one of its conversation, among the shortest.

    Lines are turns of one conversation if their turns before the answer are the same, or if one goes on from the answer
    of the other.
    """
    of_turns: dict[tuple[Turn, ...], str] = {}  # turns with or without the answer → the conversation
    found: dict[str, str] = {}
    for line in sorted(lines, key=lambda line: len(line.turns)):
        starts = [line.turns, *(line.turns[:n] for n in range(len(line.turns) - 1, 0, -1))]
        answered = (start for start in starts if start == line.turns or start[-1][0] == "assistant")
        found[line.id] = next((of_turns[start] for start in answered if start in of_turns), line.id)
        of_turns.setdefault(line.turns, found[line.id])
        for reference in line.references:
            of_turns.setdefault((*line.turns, ("assistant", reference)), found[line.id])
    return [found[line.id] for line in lines]


class _Line:
    """Reads one line and reports everything that is wrong with it."""

    def __init__(self, where: str, problems: ProblemList) -> None:
        self.where, self.problems = where, problems

    def complain(self, message: str) -> None:
        self.problems.add(f"{self.where}: {message}")

    def read(self, raw: bytes, line_id: str) -> Conversation | None:
        known = len(self.problems.messages)
        record = self._parse(raw)
        if record is None:
            return None
        verbatim = _forms(record) == ["prompt"] and isinstance(record["prompt"], str)
        turns = self._turns(record)
        if len(self.problems.messages) == known:
            self._check_order([role for role, _ in turns])
        for key, instead in _UNREAD.items():
            if record.get(key) not in (None, "", []):
                self.complain(f"{key}: found {_shown(record[key])}, which would not be read; {instead}")
        references = self._references(record)
        if len(self.problems.messages) > known:
            return None
        answer = turns[-1][1]
        others = [text for text in dict.fromkeys(references) if text != answer]
        return Conversation(line_id, tuple(turns[:-1]), (answer, *others), verbatim)

    def _parse(self, raw: bytes) -> dict[str, Any] | None:
        try:
            record = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
        except UnicodeDecodeError as error:
            self.complain(f"byte {error.start + 1} is not UTF-8: {raw[error.start : error.start + 1]!r}")
        except json.JSONDecodeError as error:
            around = f"{_around(error.doc, error.pos)!r}{looks_like(error.doc)}"
            self.complain(f"column {error.colno}: broken JSON, {error.msg}: {around}")
        except (ValueError, RecursionError) as error:
            self.complain(f"cannot be read: {error}")
        else:
            if isinstance(record, dict):
                return record
            self.complain(f"an object is needed; found {_shown(record)}")
        return None

    def _turns(self, record: dict[str, Any]) -> list[Turn]:
        forms = _forms(record)
        if len(forms) != 1:
            found = ", ".join(map(repr, record)) or "no keys"
            allowed = " or ".join(_FORMS.values())
            near = did_you_mean(next(iter(record), ""), _FORMS).partition("; ")[2]
            filled = {key for key, value in record.items() if value not in (None, "", [])}
            other = next((what for keys, what in _OTHER_FORMS.items() if filled >= {*keys} and not forms), None)
            hint = f"this looks like {other}" if other else near
            self.complain(f"found {found}; allowed: {allowed}{hint and f'; {hint}'}")
            return []
        if forms == ["messages"]:
            return self._messages(record, "messages")
        if forms == ["instruction"]:
            return self._instruction(record)
        if isinstance(record["prompt"], str):
            pair = (self._text(record, "prompt"), self._text(record, "completion"))
            return list(zip(("user", "assistant"), pair, strict=True))
        return self._messages(record, "prompt") + self._messages(record, "completion")

    def _instruction(self, record: dict[str, Any]) -> list[Turn]:
        asked = self._text(record, "instruction")
        if record.get("input") not in (None, ""):  # Alpaca uses "" for none
            asked = f"{asked}\n{self._text(record, 'input')}"
        return [("user", asked), ("assistant", self._text(record, "output"))]

    def _messages(self, record: dict[str, Any], key: str) -> list[Turn]:
        messages = record.get(key)
        if not isinstance(messages, list) or not messages:
            self.complain(f"{key}: a list of messages is needed; found {_shown(messages)}")
            return []
        turns: list[Turn] = []
        for number, message in enumerate(messages):
            where = f"{key}[{number}]"
            if not isinstance(message, dict):
                self.complain(f"{where}: an object with role and content is needed; found {_shown(message)}")
                continue
            role = message.get("role")
            if role not in ROLES:
                self.complain(f"{where}.role: unknown role {_shown(role)}; {did_you_mean(str(role), ROLES)}")
            for unread in _UNREAD_OF_MESSAGE:
                if message.get(unread) not in (None, "", [], {}):
                    self.complain(f"{where}.{unread}: found {_shown(message[unread])}; allowed: messages of text alone")
            turns.append((str(role), self._text(message, "content", f"{where}.")))
        return turns

    def _check_order(self, roles: list[str]) -> None:
        """A system message may come first; then user and assistant alternate, and the assistant comes last."""
        if not roles:
            return
        turns = roles[1:] if roles[0] == "system" else roles
        expected = ["user", "assistant"] * (len(turns) // 2 + 1)
        wrong = next((n for n, (role, wanted) in enumerate(zip(turns, expected, strict=False)) if role != wanted), None)
        if wrong is not None:
            place = wrong + len(roles) - len(turns)
            self.complain(f"message {place} has the role {turns[wrong]}; {expected[wrong]} was expected")
        elif len(turns) % 2 or not turns:
            self.complain(f"the last message has the role {roles[-1]}; an answer of the assistant is needed")

    def _references(self, record: dict[str, Any]) -> list[str]:
        texts = record.get("references")
        if texts is None:
            return []
        if not isinstance(texts, list):
            self.complain(f"references: a list of texts is needed; found {_shown(texts)}")
            return []
        numbered = {f"references[{number}]": text for number, text in enumerate(texts)}
        return [self._text(numbered, key) for key in numbered]

    def _text(self, holder: dict[str, Any], key: str, prefix: str = "") -> str:
        """The text of a key; if it has none, this is reported and the text is empty."""
        text = holder.get(key)
        if not isinstance(text, str):
            self.complain(f"{prefix}{key}: a text is needed; found {_shown(text)}")
            return ""
        if not text.strip():
            self.complain(f"{prefix}{key} is empty")
        elif problem := unicode_problem(text):
            self.complain(f"{prefix}{key}: {problem}")
        return text


def _forms(record: dict[str, Any]) -> list[str]:
    """The forms of a line by what is filled: a table of mixed forms has empty columns, a chat a copy of its prompt."""
    present = [key for key in _FORMS if key in record]
    filled = [key for key in present if all(record.get(needed) not in (None, "", []) for needed in _NEEDED[key])]
    begun = [key for key in present if record[key] is not None]
    return filled or begun or present


def _shown(value: Any) -> str:
    return "nothing" if value is None else ascii(value)[:80]


def _around(text: str, position: int) -> str:
    return text[max(0, position - 30) : position + 30]
