"""JSON annotation files: what is read, and where a message says that something is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.core.errors import Problems, UserError
from tasks.formats.json_file import parse_json


@dataclass
class Item:
    name: str


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "items.json"


def test_keys_that_the_type_lacks_and_a_byte_order_mark_are_skipped(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbf[{"name": "a", "size": 3}]')
    assert parse_json(path, list[Item]) == [Item("a")]


def test_every_wrong_value_is_named_by_its_key(path: Path) -> None:
    path.write_text('[{"name": 1}, {"name": "b"}, {}]', encoding="utf-8")
    with pytest.raises(Problems, match=r"items\.json: 0\.name: .*; found '1'\n.*items\.json: 2\.name: Field required"):
        parse_json(path, list[Item])


def test_a_syntax_error_is_shown_with_the_text_around_it(path: Path) -> None:
    path.write_text('[\n{"name": "' + "long " * 99 + 'end" 1}]', encoding="utf-8")
    with pytest.raises(UserError, match=r"items\.json: line 2, column \d+: broken JSON, .*: 'ong long .*end\" 1\}\]'$"):
        parse_json(path, list[Item])


@pytest.mark.parametrize("text", ["", "[" * 100_000])
def test_no_json_at_all_is_refused(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"items\.json: .*broken JSON, "):
        parse_json(path, list[Item])


@pytest.mark.parametrize("text", ['["\\ud800"]', '["\\ude00"]', '["\\ud83d and more"]'])
def test_half_a_surrogate_pair_is_valid_json_and_no_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"items\.json: line 1, column \d+: half of a surrogate pair, which is not"):
        parse_json(path, list[str])


def test_a_file_that_could_not_be_read_is_named(path: Path) -> None:
    with pytest.raises(UserError, match=r"items\.json: cannot be read: No such file"):
        parse_json(path, list[Item])
