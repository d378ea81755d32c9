"""The examples of large annotation files, parsed once for all trials and runs of a machine.

VQAv2's annotations are 400 MB of JSON, whose parsing takes half a minute and gigabytes. So what was parsed and checked
is kept in ``$HARNESS_CACHE/annotations`` as an Arrow file, which is mapped: an example is made when it is asked for.
The file is keyed by the content of the annotations, the task's options and the code that reads them, and is good as
long as no file was added to or removed from the folders of the inputs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from harness.core.disk_cache import DiskCache, Use
from harness.core.errors import UserError
from harness.core.files import cache_folder, digests_of
from harness.core.forecast import GIB
from tasks.base import Example, Part, Split, Task

LEAST_BYTES = 1 << 20  # of annotations; smaller ones are read as fast
LIMIT_BYTES = 20 * GIB
_FORMAT = 1
_TEXT = pa.dictionary(pa.int32(), pa.large_string())
_SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "target": _TEXT,
        "member": _TEXT,
        "cluster": _TEXT,
        "references": pa.list_(_TEXT),
        "contexts": pa.list_(_TEXT),
        "values": pa.list_(_TEXT),
        "are_files": pa.list_(pa.bool_()),
    }
)
Splits = Mapping[Split, Sequence[Example]]
logger = logging.getLogger(__name__)


class _Pool:
    """The different texts of a column; equal texts are one object."""

    def __init__(self, column: Any) -> None:
        self._numbers, self._texts = column.indices.fill_null(-1).to_numpy(zero_copy_only=False), column.dictionary
        self._made: dict[int, str] = {}

    def __getitem__(self, places: slice) -> list[str]:
        made, found = self._made, []
        for number in self._numbers[places].tolist():
            if number not in made:
                made[number] = self._texts[number].as_py()
            found.append(made[number])
        return found

    def one(self, place: int) -> str | None:
        """The text at a place, if there is one."""
        return self[place : place + 1][0] if self._numbers[place] >= 0 else None


class _Rows:
    """The examples of all splits in a mapped Arrow table of one chunk."""

    def __init__(self, table: pa.Table, use: Use | None = None) -> None:
        self._use = use  # as long as the table is mapped
        columns = {name: table.column(name).chunk(0) for name in _SCHEMA.names}
        self.ids = columns["id"]
        self._targets, self._members, self._clusters = (
            _Pool(columns[name]) for name in ("target", "member", "cluster")
        )
        self._references, self._contexts, self._values = (
            _Pool(columns[name].values) for name in ("references", "contexts", "values")
        )
        self._reference_ends, self._input_ends = (columns[name].offsets.to_numpy() for name in ("references", "values"))
        self._are_files = columns["are_files"].values.to_numpy(zero_copy_only=False)
        self._paths: dict[str, Path] = {}

    def member(self, row: int) -> str:
        return self._members.one(row) or ""

    def __getitem__(self, row: int) -> Example:
        references, inputs = (slice(*ends[row : row + 2].tolist()) for ends in (self._reference_ends, self._input_ends))
        kinds = zip(self._contexts[inputs], self._values[inputs], self._are_files[inputs].tolist(), strict=True)
        return Example(
            self.ids[row].as_py(),
            tuple(Part(context, self._path(value) if is_file else value) for context, value, is_file in kinds),
            tuple(self._references[references]),
            self._targets.one(row),
            self.member(row),
            self._clusters.one(row),
        )

    def _path(self, value: str) -> Path:
        if value not in self._paths:
            self._paths[value] = Path(value)
        return self._paths[value]


class ParsedExamples(Sequence[Example]):
    """The examples of a split, each made when it is asked for.

    Args:
        rows: of all splits.
        chosen: the rows of this split, in order.
    """

    def __init__(self, rows: _Rows, chosen: range) -> None:
        self._rows, self._chosen = rows, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ParsedExamples: ...
    def __getitem__(self, index: int | slice) -> Example | ParsedExamples:
        if isinstance(index, slice):
            return ParsedExamples(self._rows, self._chosen[index])
        return self._rows[self._chosen[index]]

    def __iter__(self) -> Iterator[Example]:
        return map(self._rows.__getitem__, self._chosen)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Example.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    @property
    def ids(self) -> list[str]:
        """The ids of all, without making the examples."""
        ids = self._rows.ids.take(pa.array(np.arange(self._chosen.start, self._chosen.stop, self._chosen.step)))
        return [str(one) for one in ids.to_pylist()]

    @property
    def members(self) -> list[str]:
        """The members of a mixture that they belong to."""
        return [self._rows.member(row) for row in self._chosen]


def parsed_once(task: Task, files: Sequence[Path] | None, parse: Callable[[], Splits]) -> Splits:
    """The splits of a task, from the cache if they were parsed before.

    Args:
        task: whose class and options say how the files are read.
        files: annotations that the examples depend on, besides the names of their inputs; None: it is not known.
        parse: reads and checks them.

    Raises:
        Exception: whatever ``parse`` raises; that is never kept.
    """
    try:
        if files is None or sum(path.stat().st_size for path in files) < LEAST_BYTES:
            return parse()
        key = _key(task, files)
    except OSError:  # parsing says more about a file that is not there
        return parse()
    cache = DiskCache(cache_folder("annotations"), LIMIT_BYTES, "set HARNESS_CACHE to a folder with room")
    try:
        lock = cache.lock(key)
        lock.acquire()
    except OSError as error:
        logger.warning("annotations are parsed in every trial: %s: %s", cache.folder, error.strerror or error)
        return parse()
    try:
        found = _read(cache, key)
        return _kept(cache, key, parse()) if found is None else found
    finally:
        lock.release()


def _key(task: Task, files: Sequence[Path]) -> str:
    kind = type(task)
    source = inspect.getsourcefile(kind)
    content = [
        _FORMAT,
        f"{kind.__module__}:{kind.__qualname__}",
        kind.result_version,
        digests_of([Path(source)] if source else []),
        _code(),
        task.config.model_dump_json(),
        [[str(path.absolute()), digest] for path, digest in zip(files, digests_of(files), strict=True)],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@cache
def _code() -> list[str]:
    """Digests of the code that reads annotations."""
    return digests_of(sorted(Path(__file__).parent.rglob("*.py")))


def _read(cache: DiskCache, key: str) -> Splits | None:
    for path in cache.files(key):
        use = Use(cache)
        try:
            if not use.take(path):
                continue
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            about = json.loads(table.schema.metadata[b"about"])
            if table.schema.remove_metadata() != _SCHEMA or table.column("id").num_chunks != 1:
                raise ValueError("another schema")
            if about["folders"] == {folder: _stamp(folder) for folder in about["folders"]}:
                rows = _Rows(table, use)
                return {split: ParsedExamples(rows, range(*about["splits"][split])) for split in about["splits"]}
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            cache.remove_broken(path, f"cannot be read ({error})")
            continue
        with suppress(OSError):  # files were added or removed
            path.unlink()
    return None


def _kept(cache: DiskCache, key: str, splits: Splits) -> Splits:
    try:
        content = _written(splits)
        cache.add(key, content, ".arrow")
    except (OSError, UserError, pa.ArrowException, UnicodeEncodeError) as error:
        logger.warning("annotations are parsed in every trial: %s", error)
        return splits
    return _read(cache, key) or splits


def _written(splits: Splits) -> Any:
    examples = [example for own in splits.values() for example in own]
    folders = sorted({str(path.parent) for example in examples for _, path in example.files})
    ends = np.cumsum([0, *map(len, splits.values())]).tolist()
    places = {split: [start, stop] for split, start, stop in zip(splits, ends, ends[1:], strict=False)}
    about = {"splits": places, "folders": {folder: _stamp(folder) for folder in folders}}

    def texts(lists: list[list[str]]) -> pa.Array:
        offsets = pa.array(np.cumsum([0, *map(len, lists)]), pa.int32())
        flat = pa.array([text for one in lists for text in one], pa.large_string())
        return pa.ListArray.from_arrays(offsets, flat.dictionary_encode())

    def one(values: list[str | None]) -> pa.Array:
        return pa.array(values, pa.large_string()).dictionary_encode()

    table = pa.table(
        [
            pa.array([e.id for e in examples], pa.large_string()),
            one([e.target for e in examples]),
            one([e.member for e in examples]),
            one([e.cluster for e in examples]),
            texts([list(e.references) for e in examples]),
            texts([[part.context for part in e.inputs] for e in examples]),
            texts([[str(part.value) for part in e.inputs] for e in examples]),
            pa.array([[isinstance(part.value, Path) for part in e.inputs] for e in examples], pa.list_(pa.bool_())),
        ],
        schema=_SCHEMA.with_metadata({"about": json.dumps(about)}),
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=sys.maxsize)
    return sink.getvalue().to_pybytes()


def _stamp(folder: str) -> int:
    """What changes when a file is added to a folder or removed from it."""
    return Path(folder).stat().st_mtime_ns
