"""Text as data sets hold it, read and checked in one place for all tasks: encodings, compression, Unicode."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from harness.core.errors import UserError

_COMPRESSED: Mapping[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"BZh": ("bzip2", bz2.decompress),
    b"\xfd7zXZ\0": ("xz", lzma.decompress),
}
_UNREADABLE = {  # first bytes → what it is, and what to do
    b"PK\x03\x04": "a ZIP archive; unpack it (gzip, bzip2 and xz are read as they are)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it (gzip, bzip2 and xz are read as they are)",
    b"PAR1": "Parquet; text is needed (to_json of the library datasets writes JSON Lines)",
    b"ARROW1": "Arrow; text is needed (to_json of the library datasets writes JSON Lines)",
}
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SURROGATE = re.compile("[\ud800-\udfff]")
# Layouts that are not read, by the beginning of the file, each with what to do instead.
_KNOWN = (
    (
        re.compile(r"[^\s#|,]+\.(?:jpg|jpeg|png)#\d+\t", re.IGNORECASE),
        "Flickr's token file (picture#number, tab, caption); use Karpathy's JSON (`karpathy`) or COCO's layout",
    ),
    (
        re.compile(r"image(?:_name)?\s*[,|]\s*(?:comment_number\s*[,|]\s*)?(?:caption|comment)", re.IGNORECASE),
        "Flickr's captions as a table; use Karpathy's JSON (`karpathy`), or an image folder with metadata.csv",
    ),
    (
        re.compile(r"LJ\d{3}-\d{4}\|"),
        "LJ Speech's metadata.csv (name|text|normalised text, without a header); write file_name,transcription",
    ),
    (
        re.compile(r"client_id\t"),
        "Common Voice's table (tabs; path, sentence); write metadata.csv with file_name,transcription",
    ),
    (re.compile(r"\s*<(?:!doctype|html)", re.IGNORECASE), "a web page: the download failed"),
    (re.compile(r"version https://git-lfs"), "a pointer of Git LFS, not the file: fetch it with `git lfs pull`"),
)


def read_utf8(path: Path) -> bytes:
    """A text file's content as UTF-8, decompressed, without byte-order mark; UTF-8 itself is not checked.

    Raises:
        UserError: it cannot be read or decompressed, or is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    for mark, (name, decompress) in _COMPRESSED.items():
        if data.startswith(mark):
            try:
                data = decompress(data)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise UserError(f"{path}: broken {name} file: {error}") from error
            break
    for mark, what in _UNREADABLE.items():
        if data.startswith(mark):
            raise UserError(f"{path}: is {what}")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None and len(data) > 1 and (data[0] == 0) != (data[1] == 0):  # UTF-16 without its mark
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    if encoding is None:
        return data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode(encoding).removeprefix("\ufeff").encode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: broken {encoding.upper()} at byte {error.start + 1}; save the file as UTF-8"
        ) from error


def read_text(path: Path) -> str:
    """Read a text file: UTF-8, or UTF-16 or 32, with or without byte-order mark, compressed or not.

    Raises:
        UserError: it cannot be read; for bytes that are not UTF-8, the message gives their line.
    """
    content = read_utf8(path)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line}: not UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from error


def unicode_problem(text: str) -> str | None:
    """What makes a text not Unicode (JSON can say half of an emoji); None: nothing."""
    if text.isascii() or not _SURROGATE.search(text):
        return None
    return f"half of a surrogate pair, which is not Unicode text; found {ascii(text)[:80]}"


def looks_like(text: str) -> str:
    """The end of a message about a file of the wrong format: a known layout that it looks like, or nothing."""
    return next((f"; this looks like {what}" for pattern, what in _KNOWN if pattern.match(text)), "")


def folder_looks_like(folder: Path) -> str:
    """As ``looks_like``, of the text files in a folder."""
    for path in sorted([*folder.glob("*.txt"), *folder.glob("*.csv"), *folder.glob("*.token"), *folder.glob("*.tsv")]):
        with path.open("rb") as file:
            if found := looks_like(file.read(400).decode("utf-8-sig", errors="replace")):
                return f"{found} ({path.name})"
    return ""
