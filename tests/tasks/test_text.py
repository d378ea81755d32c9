"""The reader of conversations: three forms, chat templates, splits, and everything that can be wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from harness.core.errors import ProblemList, Problems, UserError
from tasks.base import Example, Part
from tasks.formats.conversations import read_lines
from tasks.text import Text

GOOD = {"prompt": "The sky is", "completion": " blue."}


def text(root: Path, **options: Any) -> Text:
    return Text(Text.Config(root=root, **options))


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(root: Path, *records: Any, **options: Any) -> list[Example]:
    """The training examples made of these lines."""
    write(root / "train.jsonl", *records)
    write(root / "val.jsonl", GOOD)
    write(root / "test.jsonl", GOOD)
    return list(text(root, validation="val.jsonl", test="test.jsonl", **options).examples("train"))


def chat(*turns: str) -> dict[str, Any]:
    """Messages from "user: hello"."""
    return {"messages": [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]}


def test_a_conversation_ends_in_its_target(tmp_path: Path) -> None:
    line = chat("system: Be brief.", "user: 1 + 1?", "assistant: 2", "user: Why?", "assistant: Because.")
    (example,) = read(tmp_path, line | {"source": "forum", "id": 7})
    assert example.id == "train.jsonl:1"
    assert example.inputs == (
        Part("system", "Be brief.\n"),
        Part("user", "1 + 1?\n"),
        Part("assistant", "2\n"),
        Part("user", "Why?\n"),
    )
    assert example.references == ("Because.",)
    assert example.target is None  # the last context: the assistant's
    (without,) = read(tmp_path, chat("user: Why?", "assistant: Because."))
    assert without.inputs == (Part("user", "Why?\n"),)


def test_the_other_forms(tmp_path: Path) -> None:
    translate, plain, sky, talk = read(
        tmp_path,
        {"instruction": "Translate.", "input": "The sky.", "output": "Le ciel."},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
        GOOD,
        {"prompt": chat("user: Why?")["messages"], "completion": chat("assistant: Because.")["messages"]},
    )
    assert translate.inputs == (Part("user", "Translate.\nThe sky.\n"),)
    assert translate.references == ("Le ciel.",)
    assert plain.inputs == (Part("user", "Greet.\n"),)
    assert (sky.inputs, sky.references) == ((Part("user", "The sky is"),), (" blue.",))  # no template: TRL has none
    assert (talk.inputs, talk.references) == ((Part("user", "Why?\n"),), ("Because.",))


def test_the_form_of_a_line_is_what_is_filled(tmp_path: Path) -> None:
    """Rows of ultrachat_200k (messages beside their prompt), and of mixed tables with null or empty columns."""
    talk = chat("user: Why?", "assistant: Because.")
    alpaca = {"instruction": "Why?", "output": "Because."}
    empty: dict[str, Any] = {"messages": None, "instruction": None, "input": None, "output": None, "prompt": None}
    rows = [
        {"prompt": "Why?", "prompt_id": "f0e37e9f", **talk},
        {"prompt": [{"role": "user", "content": "Why?"}], **talk, "completion": None},
        empty | talk | {"completion": None, "references": None},
        empty | alpaca,
        {"messages": [], "prompt": "", "completion": "", **alpaca},
    ]
    for row, example in zip(rows, read(tmp_path, *rows), strict=True):
        assert (example.inputs, example.references) == ((Part("user", "Why?\n"),), ("Because.",)), row
    (plain,) = read(tmp_path, {"messages": None, "instruction": "", "output": None, **GOOD})
    assert (plain.inputs, plain.references) == ((Part("user", "The sky is"),), (" blue.",))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_files_of_any_unicode_encoding_compressed_or_not(tmp_path: Path, encoding: str, compress: Any) -> None:
    lines = [json.dumps({"prompt": f"È {n}? 日本\u2028", "completion": " 🙂"}, ensure_ascii=False) for n in range(3)]
    for name in ("train.jsonl.gz", "validation.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes(compress("\r\n".join(lines).encode(encoding)))
    options = {"train": "train.jsonl.gz", "validation": "validation.jsonl", "test": "test.jsonl"}
    examples = text(tmp_path, **options).examples("train")
    assert [e.id for e in examples] == [f"train.jsonl.gz:{n}" for n in (1, 2, 3)]
    assert [e.inputs[0].value for e in examples] == [f"È {n}? 日本\u2028" for n in range(3)]
    assert {e.references for e in examples} == {(" 🙂",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], r"train\.jsonl: broken gzip file"),
        (b"PK\x03\x04abc", r"train\.jsonl: is a ZIP archive; unpack it"),
        (b"\x28\xb5\x2f\xfdabc", r"train\.jsonl: is compressed with zstd"),
        (b"PAR1abc", r"train\.jsonl: is Parquet; text is needed"),
        (b"\xff\xfe\x00\xd8", r"train\.jsonl: broken UTF-16-LE at byte 3"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"line 1: .*this looks like a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", r"line 1: .*this looks like a web page: the download failed"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        text(tmp_path).prepare()


def test_templates_stand_around_each_turn(tmp_path: Path) -> None:
    (example,) = read(
        tmp_path,
        chat("system: S{}", "user: {content}", "assistant: A", "user: U", "assistant: {B}"),
        system_template="<s>{content}",
        user_template="Q: {content}\n",
        assistant_template="A: {content}</s>",
    )
    assert "".join(str(part.value) for part in example.inputs) == "<s>S{}Q: {content}\nA: A</s>Q: U\n"
    assert example.references == ("{B}",)
    with pytest.raises(ValidationError, match=r"must contain \{content\} exactly once; found 'Q:'"):
        text(tmp_path, user_template="Q:")


def test_text_is_kept_to_the_letter(tmp_path: Path) -> None:
    content = "  2024-01-31\r\n\tÜber 猫 👍 a\u2028b\u0085c " + "x" * 10_000
    for example in read(tmp_path, {"prompt": content, "completion": content}):
        assert example.inputs[0].value == content
        assert example.references == (content,)


def test_several_references_are_kept_once_each(tmp_path: Path) -> None:
    (example,) = read(tmp_path, {**GOOD, "references": [" azure.", " blue.", " azure."]})
    assert example.references == (" blue.", " azure.")


def test_bom_crlf_and_blank_lines_are_taken(tmp_path: Path) -> None:
    read(tmp_path, GOOD)
    line = json.dumps(GOOD).encode()
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    examples = text(tmp_path, validation="val.jsonl", test="test.jsonl").examples("train")
    assert [example.id for example in examples] == ["train.jsonl:1", "train.jsonl:4"]


def test_a_pattern_reads_several_files_in_order(tmp_path: Path) -> None:
    for name in ("b/part.jsonl", "a/part.jsonl"):
        write(tmp_path / "shards" / name, GOOD, GOOD)
    write(tmp_path / "val.jsonl", GOOD)
    write(tmp_path / "[1].jsonl", GOOD)
    task = text(tmp_path, train="shards/**/*.jsonl", validation="val.jsonl", test="[[]1].jsonl")
    assert [e.id for e in task.examples("train")] == [f"shards/{s}/part.jsonl:{n}" for s in "ab" for n in (1, 2)]
    assert task.examples("test")[0].id == "[1].jsonl:1"


def test_splits_without_files_are_made_by_a_hash_of_the_question(tmp_path: Path) -> None:
    lines = [{"prompt": f"{number // 2} + 1 =", "completion": f" {number}"} for number in range(800)]
    write(tmp_path / "train.jsonl", *lines)
    task = text(tmp_path)
    parts = {split: {e.inputs[0].value for e in task.examples(split)} for split in ("train", "validation", "test")}
    sizes = [len(task.examples(split)) for split in ("train", "validation", "test")]
    assert sum(sizes) == 800
    assert 40 < sizes[1] + sizes[2] < 120  # a tenth of the training lines
    assert min(sizes[1:]) > 15
    assert sum(map(len, parts.values())) == 400  # the same question is never in two splits
    write(tmp_path / "val.jsonl", *lines[:100])
    given = text(tmp_path, validation="val.jsonl")
    assert len(given.examples("train")) == 800
    assert len(given.examples("validation")) + len(given.examples("test")) == 100
    assert text(tmp_path, user_template="Q: {content}", test="val.jsonl").examples(
        "validation"
    )  # templates do not change the splits
    assert [e.id for e in text(tmp_path, user_template="Q: {content}").examples("test")] == [
        e.id for e in task.examples("test")
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chat("user: a", "asistant: b"), r"messages\[1\]\.role: unknown role 'asistant'; .*did you mean 'assistant'\?"),
        (
            chat("human: a", "assistant: b"),
            r"messages\[0\]\.role: unknown role 'human'; allowed: assistant, system, user",
        ),
        (chat("user: a", "assistant: b", "user: c"), r"the last message has the role user; an answer of the assistant"),
        (chat("system: a"), r"the last message has the role system; an answer"),
        (chat("assistant: a"), r"message 0 has the role assistant; user"),
        (chat("user: a", "user: b", "assistant: c"), r"message 1 has the role user; assistant"),
        (
            chat("system: a", "user: b", "assistant: c", "assistant: d"),
            r"message 3 has the role assistant; user",
        ),
        (chat("user: a", "system: b", "assistant: c"), r"message 1 has the role system; assistant"),
        (chat("user:  ", "assistant: b"), r"messages\[0\]\.content is empty"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content: a text is needed; found nothing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"content: a text is needed; found \[\{'type'",
        ),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]\.role: unknown role nothing"),
        ({"messages": ["a"]}, r"messages\[0\]: an object with role and content is needed; found 'a'"),
        ({"messages": []}, r"messages: a list of messages is needed; found \[\]"),
        ({"messages": "a"}, r"messages: a list of messages is needed; found 'a'"),
        ({"instruction": "a", "output": ""}, r"output is empty"),
        ({"instruction": "a"}, r"output: a text is needed; found nothing"),
        ({"instruction": "a", "input": 5, "output": "b"}, r"input: a text is needed; found 5"),
        ({"prompt": "a", "completion": 5}, r"completion: a text is needed; found 5"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
            r"completion: a list of messages is needed",
        ),
        ({**GOOD, "references": "b"}, r"references: a list of texts is needed; found 'b'"),
        ({**GOOD, "references": ["b", " "]}, r"references\[1\] is empty"),
        ({"prompt": "a", "completion": "\ud800"}, r"completion: half of a surrogate pair"),
        ({"mesages": []}, r"found 'mesages'; allowed: .*\"instruction\".*; did you mean 'messages'\?"),
        ({**GOOD, **chat("user: a", "assistant: b")}, r"found 'prompt', 'completion', 'messages'; allowed: "),
        ({"messages": None, "instruction": None}, r"found 'messages', 'instruction'; allowed: "),
        ({"messages": None, "instruction": "a", "output": None}, r"output: a text is needed; found nothing"),
        ({"conversations": [{"from": "human", "value": "a"}]}, r"allowed: .*; this looks like ShareGPT's"),
        ({"question": "a", "answer": "b"}, r"; this looks like a question and its answer; write prompt and completion"),
        ({"chosen": [1], "rejected": [2]}, r"; this looks like a preference pair"),
        ({"text": "a"}, r"; this looks like plain text to continue"),
        ({"system": "s", "instruction": "a", "output": "b"}, r"system: found 's', which would not be read; write mes"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, r"history: found .*, which would not be read"),
        ({**chat("user: a", "assistant: b"), "tools": [{"name": "t"}]}, r"tools: found .*, which would not be read"),
        (
            {"messages": [chat("user: a")["messages"][0], {"role": "assistant", "content": "b", "tool_calls": [1]}]},
            r"messages\[1\]\.tool_calls: found \[1\]; allowed: messages of text alone",
        ),
        ({}, r"found no keys; allowed: "),
        ([1], r"train\.jsonl: is a JSON array; one object per line is needed"),
        (5, r"an object is needed; found 5"),
    ],
)
def test_a_wrong_line_is_refused_with_the_place(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, record)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "prompt": "b", "completion": "c"}',
        '{"messages": [{"role": "user", "content": "a", "role": "system"}]}',
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.jsonl").write_text(line)
    problems = ProblemList()
    assert read_lines(tmp_path / "train.jsonl", "train.jsonl", problems) == []
    assert "line 1: cannot be read: the key '" in problems.messages[0]
    assert problems.messages[0].endswith("is there twice")


def test_what_is_not_read_may_be_there_empty(tmp_path: Path) -> None:
    read(tmp_path, {"system": "", "history": [], "tools": None, "instruction": "a", "output": "b", "id": 5})


def test_all_problems_of_all_files_come_at_once_with_their_lines(tmp_path: Path) -> None:
    read(tmp_path, GOOD)
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "a" "completion"}\n\n{"prompt": "\xfc"}\n' + b"[" * 200_000)
    write(tmp_path / "val.jsonl", chat("user:  ", "bot: "))
    with pytest.raises(Problems, match="problems:") as caught:
        text(tmp_path, validation="val.jsonl", test="test.jsonl").prepare()
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    json_error, encoding, depth, *roles = caught.value.messages
    assert json_error.startswith(f"{train}: line 1: column 16: broken JSON, Expecting ',' delimiter: '")
    assert encoding == f"{train}: line 3: byte 13 is not UTF-8: b'\\xfc'"
    assert depth.startswith(f"{train}: line 4: cannot be read: ")
    assert roles == [
        f"{val}: line 1: messages[0].content is empty",
        f"{val}: line 1: messages[1].role: unknown role 'bot'; allowed: assistant, system, user",
        f"{val}: line 1: messages[1].content is empty",
    ]


def test_files_that_are_missing_empty_or_in_two_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(
        UserError, match=r"'trian.jsonl': no file has this name or pattern; .*did you mean 'train.jsonl'"
    ):
        text(tmp_path, train="trian.jsonl").prepare()
    with pytest.raises(UserError, match=r"nowhere: the folder of conversations does not exist"):
        text(tmp_path / "nowhere").prepare()
    with pytest.raises(UserError, match=r"train\.jsonl: the folder of conversations is a file"):
        text(tmp_path / "train.jsonl").prepare()
    with pytest.raises(UserError, match=r"train\.jsonl is in train and in validation; splits may not overlap"):
        text(tmp_path, validation="*.jsonl").prepare()
    with pytest.raises(UserError, match=r"no examples for (train|validation)"):
        text(tmp_path).prepare()
    write(tmp_path / "val.jsonl")
    with pytest.raises(UserError, match=r"val\.jsonl: the file has no lines"):
        text(tmp_path, validation="val.jsonl").prepare()
    with pytest.raises(UserError, match=r"'a\*\*': no file has this name|'a\*\*' is not a valid pattern"):
        text(tmp_path, train="a**").prepare()


@pytest.mark.parametrize("name", ["../train.jsonl", "/etc/passwd", "a/../../b", ""])
def test_names_cannot_lead_out_of_the_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValidationError, match="must be the name or the pattern of files inside the root"):
        text(tmp_path, train=name)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    write(tmp_path / "train.jsonl", GOOD)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"train\.jsonl: cannot be read: Permission denied"):
        text(tmp_path).prepare()


def test_the_sample_has_every_form_and_varying_turns(tmp_path: Path) -> None:
    options = Text.sample(tmp_path)
    task = Text(Text.Config.model_validate_json(json.dumps(options)))
    turns = {tuple(part.context for part in example.inputs) for example in task.examples("train")}
    assert turns == {("user",), ("system", "user", "assistant", "user"), ("user", "assistant", "user")}
