"""Tables and the files they name: what is kept, and everything that can be wrong with a row or a path."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import soundfile

from harness.core.errors import ProblemList, UserError
from tasks.formats.audio_tables import AudioFiles, Row, read_table, write_tone
from tasks.formats.data_files import MissingFileError


def rows_and_problems(path: Path, content: bytes | str) -> tuple[list[Row], list[str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    problems = ProblemList()
    return read_table(path, ("file_name", "text"), problems), problems.messages


@pytest.mark.parametrize("text", ["Où est-ce, l’été — 日本語 ß?", "a\u2028b", 'say "yes", \u0301', "7"])
def test_texts_are_kept_exactly(tmp_path: Path, text: str) -> None:
    line = json.dumps({"file_name": "a.wav", "text": text}, ensure_ascii=False)
    quoted = text.replace('"', '""')
    for name, content in {"t.jsonl": line, "t.csv": f'file_name,text\r\na.wav,"{quoted}"\r\n'}.items():
        (row,), problems = rows_and_problems(tmp_path / name, content)
        assert not problems
        assert row.values == {"file_name": "a.wav", "text": text}
        assert row.text("text") == text.replace("\u2028", " ")


def test_white_space_is_collapsed_and_length_does_not_matter(tmp_path: Path) -> None:
    (first, second), _ = rows_and_problems(tmp_path / "t.csv", f'file_name,text\na," b\n\tc "\nd,{"word " * 2000}\n')
    assert (first.text("text"), first.where) == ("b c", f"{tmp_path}/t.csv: line 3")
    assert second.text("text") == " ".join(["word"] * 2000)


def test_the_byte_order_mark_that_excel_writes_is_no_part_of_the_header(tmp_path: Path) -> None:
    (row,), problems = rows_and_problems(tmp_path / "t.csv", b"\xef\xbb\xbffile_name,text\r\n0.wav,yes\r\n\r\n")
    assert (row.values["file_name"], problems) == ("0.wav", [])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"filename,text\na,b\n", "line 1: no column 'file_name'; allowed: filename, text; did you mean 'filename'?"),
        (b"", "line 1: no column 'file_name'; allowed: nothing"),
        (b"file_name,text\na,b\nc,\xff\n", "line 3: not UTF-8 (byte 0xff); save the file as UTF-8"),
        (b"file_name,text\na\n", "line 2: the row ends before text"),
        (b"file_name,text\na,b,c\n", "line 2: more fields than the 2 of the header; quote commas"),
        (b'file_name,text\na,b\nc,"d\ne,f\n', "the row that begins in line 3: broken CSV: unexpected end of data"),
        (b'file_name,text\na,"b"c\n', "the row that begins in line 2: broken CSV: ',' expected after '\"'"),
    ],
)
def test_a_broken_csv(tmp_path: Path, content: bytes, problem: str) -> None:
    assert problem in rows_and_problems(tmp_path / "t.csv", content)[1][0]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"file_name": "a" "text": "b"}', "line 2: broken JSON: Expecting ',' delimiter"),
        ('["a", "b"]', "line 2: found '[\"a\", \"b\"]'; an object is needed: {'file_name': …}"),
        ('{"file_name": "a", "txt": "b"}', "line 2: no key 'text'; allowed: file_name, txt; did you mean 'txt'?"),
        ("[" * 100_000, "line 2: broken JSON"),
        (
            '{"file_name": "a", "file_name": "b", "text": "c"}',
            "line 2: broken JSON: the key 'file_name' is there twice",
        ),
    ],
)
def test_a_broken_line_of_json_loses_no_other_line(tmp_path: Path, line: str, problem: str) -> None:
    good = '{"file_name": "a", "text": "b"}'
    rows, (told,) = rows_and_problems(tmp_path / "t.jsonl", f"{good}\n{line}\n\n{good}\n")
    assert [row.where[-6:] for row in rows] == ["line 1", "line 4"]
    assert told.startswith(f"{tmp_path}/t.jsonl: {problem}")


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()
    for name, reason in {"t.csv": "Is a directory", "gone.csv": "No such file or directory"}.items():
        problems = ProblemList()
        assert read_table(tmp_path / name, ("a",), problems) == []
        assert problems.messages == [f"{tmp_path}/{name}: cannot be read: {reason}"]


def test_half_a_surrogate_pair_in_a_transcript() -> None:
    with pytest.raises(UserError, match=r"line 3: text: half of a surrogate pair.*found 'yes \\ud83d'"):
        Row("line 3", {"text": "yes \ud83d"}).text("text")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32-be"])
def test_tables_of_other_encodings_and_compressed(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-32-be" else ""
    (tmp_path / "a.csv").write_bytes(gzip.compress(f'{mark}name,text\r\n1,"Où, là"\r\n'.encode(encoding)))
    problems = ProblemList()
    (found,) = read_table(tmp_path / "a.csv", ["name", "text"], problems)
    assert (found.text("text"), problems.messages) == ("Où, là", [])


def test_a_table_of_another_data_set_is_named(tmp_path: Path) -> None:
    for content, layout in (
        ("LJ001-0001|Printing, in|Printing, in\n", "LJ Speech's"),
        ("client_id\tpath\tsentence\n", "Common Voice's"),
    ):
        (tmp_path / "metadata.csv").write_text(content)
        problems = ProblemList()
        read_table(tmp_path / "metadata.csv", ["file_name"], problems)
        assert f"; this looks like {layout}" in problems.messages[0]


@pytest.mark.parametrize("value", ["", "  ", "?!", "…", None, 7, ["a"]])
def test_a_value_that_is_no_text(value: object) -> None:
    with pytest.raises(UserError, match=r"line 3: text: found .*; a text (with a letter or digit )?is needed"):
        Row("line 3", {"text": value}).text("text")


def test_names() -> None:
    assert Row("", {"speaker": 0}).name("speaker") == "0"
    for value in ("", " ", None):
        with pytest.raises(UserError, match=r"line 3: speaker: found .*; a name is needed"):
            Row("line 3", {"speaker": value}).name("speaker")


def test_files_below_a_linked_root_are_inside_it_and_taken_once(tmp_path: Path) -> None:
    real, root = tmp_path / "real", tmp_path / "root"
    (real / "a").mkdir(parents=True)
    (real / "a" / "b.wav").touch()
    (real / "c.wav").symlink_to(real / "a" / "b.wav")
    root.symlink_to(real)
    files = AudioFiles()
    assert files.find(root / "a", "b.wav", "line 1") == root / "a" / "b.wav"
    with pytest.raises(UserError, match=r"line 2: 'c\.wav' is already listed: line 1;"):
        files.find(root, "c.wav", "line 2")
    with pytest.raises(MissingFileError, match=r"line 3: 'd\.wav' is not in"):
        files.find(root, "d.wav", "line 3")


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_tone_is_a_sine(tmp_path: Path, suffix: str) -> None:
    write_tone(tmp_path / f"tone.{suffix}", 1000, seconds=0.5)
    samples, rate = soundfile.read(tmp_path / f"tone.{suffix}")
    assert (rate, len(samples)) == (8000, 4000)
    assert samples[[0, 2, 4, 6]] == pytest.approx([0, 0.5, 0, -0.5], abs=1e-4)  # two samples a quarter period
