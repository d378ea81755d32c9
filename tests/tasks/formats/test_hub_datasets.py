"""Data sets read through the library ``datasets``: Parquet and WebDataset shards and saved folders, written here."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from harness.core.errors import ProblemList, Problems, UserError
from tasks.captioning import CocoCaptions
from tasks.formats import hub_datasets
from tasks.formats.hub_datasets import DatasetSource, materialise

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "cache"


def encoded(number: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (6, 4), 7 * number % 256 if mode == "L" else (7 * number % 256, 9, 90)).save(buffer, kind)
    return buffer.getvalue()


def row(number: int, **values: Any) -> Row:
    image = {"bytes": encoded(number), "path": f"../../{number}.jpg"}
    return {"image": image, "caption": [f"one {number}", f"two {number}"], **values}


def parquet(path: Path, rows: list[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def shards(folder: Path, train: list[Row], **options: Any) -> Row:
    """Options of a task that trains on these rows and validates and tests on twenty others."""
    files = {
        "train": parquet(folder / "train.parquet", train),
        "validation": parquet(folder / "validation.parquet", [row(n) for n in range(100, 120)]),
    }
    return {"dataset": {"path": "parquet", "data_files": files, **options}}


def new_task(options: Row) -> CocoCaptions:
    return CocoCaptions(CocoCaptions.Config.model_validate_json(json.dumps(options)))


def content(task: CocoCaptions) -> list[tuple[str, bytes, tuple[str, ...]]]:
    return [(e.id, e.files[0][1].read_bytes(), e.references) for e in task.examples("train")]


def test_parquet_images_are_written_byte_for_byte_and_read_as_coco(tmp_path: Path, cache: Path) -> None:
    rows = [row(1), row(2, image={"bytes": encoded(2, "PNG", "L"), "path": None})]
    task = new_task(shards(tmp_path, rows))
    task.prepare()
    assert content(task) == [
        ("train-0", rows[0]["image"]["bytes"], ("one 1", "two 1")),
        ("train-1", rows[1]["image"]["bytes"], ("one 2", "two 2")),
    ]
    assert [file.name for e in task.examples("train") for _, file in e.files] == [
        "000000000000.jpg",
        "000000000001.png",
    ]
    assert len(task.examples("validation")) + len(task.examples("test")) == 20
    (folder,) = (path for path in (cache / "coco_captions").iterdir() if not path.name.startswith("."))
    again = CocoCaptions(CocoCaptions.Config(root=folder, train="train", validation="validation"))
    assert content(again) == content(task)
    assert json.loads((folder / "source.json").read_text())["source"]["path"] == "parquet"


def test_one_caption_per_row_is_grouped_by_the_id_column(tmp_path: Path) -> None:
    rows = [row(n, caption=f"caption {k}", id=n) for k, n in enumerate((5, 7, 5, 5))]
    options = shards(tmp_path, rows, id_column="id")
    parquet(tmp_path / "validation.parquet", [row(n, caption="c", id=n) for n in range(15, 23)])
    task = new_task(options)
    assert [(i, r) for i, _, r in content(task)] == [
        ("5", ("caption 0", "caption 2", "caption 3")),
        ("7", ("caption 1",)),
    ]
    assert {e.id for e in task.examples("test")} == {"16", "17", "20", "21"}  # the halves go by the id, as ever


def test_several_caption_columns_and_a_test_split(tmp_path: Path) -> None:
    def flickr(number: int) -> Row:
        return {"picture": row(number)["image"], "caption_0": f"a {number}", "caption_1": f"b {number}"}

    numbers = {"train": [1, 2], "validation": [3], "test": [4]}
    files = {split: parquet(tmp_path / f"{split}.parquet", [flickr(n) for n in ns]) for split, ns in numbers.items()}
    columns = {"image_column": "picture", "caption_column": ["caption_0", "caption_1"]}
    task = new_task({"dataset": {"path": "parquet", "data_files": files, "test": "test", **columns}})
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [2, 1, 1]
    assert task.examples("test")[0].references == ("a 4", "b 4")


def tar(path: Path, files: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def test_webdataset_shards(tmp_path: Path) -> None:
    for shard in range(2):
        samples = range(3 * shard, 3 * shard + 3)
        texts = {n: json.dumps({"captions": [f"one {n}", "zwölf"], "date": "2014-01-01"}) for n in samples}
        files = [(f"{n:05d}.{e}", d) for n in samples for e, d in (
            ("jpg", encoded(n)), ("json", texts[n].encode()), ("txt", f"2014-01-0{n + 1}".encode()))]  # fmt: skip
        tar(tmp_path / f"train-{shard}.tar", files)
    files = [(f"v{n:05d}.{e}", d) for n in range(20) for e, d in (
        ("jpg", encoded(n)), ("json", b'{"captions": ["c", "d"], "date": ""}'), ("txt", b"e"))]  # fmt: skip
    data_files = {"train": str(tmp_path / "train-*.tar"), "validation": tar(tmp_path / "val.tar", files)}
    options = {"path": "webdataset", "data_files": data_files, "image_column": "jpg"}
    task = new_task({"dataset": {**options, "caption_column": "json.captions", "id_column": "__key__"}})
    assert content(task) == [(f"{n:05d}", encoded(n), (f"one {n}", "zwölf")) for n in range(6)]
    task = new_task({"dataset": {**options, "caption_column": "txt"}})
    assert [r for _, _, r in content(task)] == [(f"2014-01-0{n + 1}",) for n in range(6)]  # text, not a date


def test_a_shard_that_is_cut_short_is_refused(tmp_path: Path, cache: Path) -> None:
    whole = Path(tar(tmp_path / "a.tar", [(f"{n}.{e}", d) for n in range(9) for e, d in (
        ("jpg", encoded(n)), ("txt", b"text"))]))  # fmt: skip
    whole.write_bytes(whole.read_bytes()[: 1024 * 14 + 700])
    files = {"train": str(whole), "validation": str(whole)}
    source = {"path": "webdataset", "data_files": files, "image_column": "jpg", "caption_column": "txt"}
    with pytest.raises(
        UserError, match=r"dataset: 'webdataset', split 'train': cannot be read after row \d: ReadError"
    ):
        materialise(DatasetSource(**source))
    parquet(tmp_path / "b.parquet", [row(n) for n in range(9)])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-50])
    files = {"train": str(tmp_path / "b.parquet"), "validation": str(tmp_path / "b.parquet")}
    with pytest.raises(UserError, match=r"dataset.*'parquet'.*cannot be read.*: Arrow"):
        materialise(DatasetSource(path="parquet", data_files=files))
    assert [path.name for path in (cache / "coco_captions").iterdir() if path.suffix != ".lock"] == []


def test_a_folder_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    for name, first in (("train", 0), ("validation", 50), ("test", 90)):
        rows = [row(first + n) for n in range(3)]
        parquet(tmp_path / "flickr" / "data" / f"{name}-00000-of-00001.parquet", rows)
    task = new_task({"dataset": {"path": str(tmp_path / "flickr"), "test": "test"}})
    assert [e.id for e in task.examples("test")] == ["test-0", "test-1", "test-2"]


def pictures(folder: Path, numbers: list[int]) -> list[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    return [encoded(number) for number in numbers]


@pytest.mark.parametrize("form", ["jsonl", "csv", "zip"])
def test_an_imagefolder_with_metadata(tmp_path: Path, form: str) -> None:
    """https://huggingface.co/docs/datasets/image_dataset#imagefolder; the files may be links, and may be zipped."""
    expected = {}
    for split, first in (("train", 0), ("validation", 40), ("test", 80)):
        numbers = [first + n for n in range(4)]
        folder = tmp_path / "pictures" / split
        expected[split] = pictures(folder, numbers)
        if form == "csv":
            text = "file_name,text\n" + "".join(f"{n}.jpg,a square {n}\n" for n in numbers)
        else:
            rows = ({"file_name": f"{n}.jpg", "text": f"a square {n}"} for n in numbers)
            text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"metadata.{'csv' if form == 'csv' else 'jsonl'}").write_text(text)
        if form == "zip":
            shutil.make_archive(str(folder), "zip", folder)
            shutil.rmtree(folder)
        else:
            (folder / f"{first}.jpg").rename(tmp_path / f"blob{first}")
            (folder / f"{first}.jpg").symlink_to(tmp_path / f"blob{first}")
    task = new_task({"dataset": {"path": str(tmp_path / "pictures"), "caption_column": "text", "test": "test"}})
    assert [data for _, data, _ in content(task)] == expected["train"]
    assert [e.references for e in task.examples("test")] == [(f"a square {80 + n}",) for n in range(4)]


def test_pictures_that_rows_only_name(tmp_path: Path) -> None:
    """In a struct or as plain text, relative to the shards or absolute, linked from elsewhere."""
    bytes_of = pictures(tmp_path / "disk", list(range(15)))[:5]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "disk")
    names = [f"images/{n}.jpg" for n in range(4)] + [str(tmp_path / "set" / "images" / "4.jpg")]
    others = [f"images/{n}.jpg" for n in range(5, 15)]
    for form in ("struct", "text"):
        files = {}
        for split, chosen in (("train", names), ("validation", others)):
            images = [{"bytes": None, "path": name} if form == "struct" else name for name in chosen]
            rows = [{"image": image, "caption": "a"} for image in images]
            files[split] = parquet(tmp_path / "set" / f"{split}-{form}.parquet", rows)
        task = new_task({"dataset": {"path": "parquet", "data_files": files}})
        assert [data for _, data, _ in content(task)] == bytes_of
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "images").symlink_to(tmp_path / "disk")
    for split in ("train", "validation", "test"):
        chosen = {"train": names[:3], "validation": names[3:4], "test": ["images/4.jpg"]}[split]
        lines = (json.dumps({"image": name, "caption": "a"}) + "\n" for name in chosen)
        (tmp_path / "folder" / f"{split}.jsonl").write_text("".join(lines))
    task = new_task({"dataset": {"path": str(tmp_path / "folder"), "test": "test"}})
    assert [data for _, data, _ in content(task)] == bytes_of[:3]


def test_a_changed_picture_behind_a_link_is_noticed(tmp_path: Path) -> None:
    pictures(tmp_path / "disk", list(range(3)))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "disk")
    source = DatasetSource(path=str(tmp_path / "set"))
    for number, split in enumerate(("train", "validation")):
        line = json.dumps({"image": f"images/{number}.jpg", "caption": "a"})
        (tmp_path / "set" / f"{split}.jsonl").write_text(line + "\n")
    first = materialise(source)
    assert materialise(source) == first
    (tmp_path / "disk" / "0.jpg").write_bytes(encoded(9))
    assert next((materialise(source) / "train").iterdir()).read_bytes() == encoded(9)


def test_the_time_of_a_row_does_not_grow_with_the_rows_before_it(tmp_path: Path) -> None:
    def seconds(before: int) -> float:
        folder = tmp_path / str(before)
        (folder / "train").mkdir(parents=True)
        writer = hub_datasets._SplitWriter(DatasetSource(path="a/b"), folder, "train", ProblemList())
        writer.digests = {str(n): n.to_bytes(32, "big") for n in range(before)}
        start = time.process_time()
        for n in range(50):
            writer._add(before + n, {"image": {"bytes": encoded(0) + bytes([n])}, "caption": "a"})
        return time.process_time() - start

    assert min(seconds(300_000 + n) for n in range(3)) < 5 * min(seconds(100 + n) for n in range(3))


def test_changed_shards_are_written_anew_and_others_are_not(tmp_path: Path, cache: Path) -> None:
    options = shards(tmp_path, [row(1), row(2)])
    source = new_task(options).config.dataset
    assert source is not None
    folder = materialise(source)
    written = folder.stat().st_mtime_ns
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: materialise(source), range(3))) == {folder}
    assert folder.stat().st_mtime_ns == written
    parquet(tmp_path / "train.parquet", [row(1), row(2), row(3)])
    assert len(new_task(options).examples("train")) == 3
    assert len(list((cache / "coco_captions").glob("[!.]*"))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": []}, r"split 'train', row 1: no caption in caption"),
        ({"caption": ["fine", " "]}, r"row 1: column 'caption': found ' ' \(str\); allowed: text"),
        ({"caption": None}, r"row 1: column 'caption': found 'None'"),
        ({"image": None}, r"row 1: column 'image' holds no image"),
        ({"image": {"bytes": b"", "path": None}}, r"row 1: column 'image' holds no image"),
        ({"image": {"bytes": b"", "path": "/etc/passwd"}}, r"row 1: picture: '/etc/passwd' leads out of"),
        ({"image": {"bytes": None, "path": "../x.jpg"}}, r"row 1: picture: '\.\./x\.jpg' leads out of"),
        ({"image": {"bytes": None, "path": "gone.jpg"}}, r"row 1: picture: 'gone\.jpg' is not in"),
        ({"image": {"bytes": None, "path": "http://x/y.jpg"}}, r"row 1: picture: 'http://x/y\.jpg' is not in"),
        ({"image": {"bytes": b"no picture", "path": "a.jpg"}}, r"row 1: not a picture \(10 bytes\)"),
        ({"image": row(1)["image"]}, r"row 1: the same picture as in the row before; .*id_column"),
    ],
)
def test_a_broken_row_is_refused_with_its_number(tmp_path: Path, cache: Path, change: Row, message: str) -> None:
    options = shards(tmp_path, [row(1), row(2, **change), row(3)])
    with pytest.raises(UserError, match=message):
        new_task(options).prepare()
    assert not list((cache / "coco_captions").glob("[!.]*"))


def test_all_broken_rows_are_told_at_once(tmp_path: Path) -> None:
    rows = [row(1, id="a"), row(2, id="a"), row(3, id=None), row(4, id="d", caption=["x", ""])]
    options = shards(tmp_path, rows, id_column="id")
    parquet(tmp_path / "validation.parquet", [row(5, id="e")])
    with pytest.raises(
        Problems, match=r"^3 problems:\n.*row 1: image a had a different picture.*\n.*row 2: .*'id'.*None.*\n.*row 3"
    ):
        new_task(options).prepare()


def test_wrong_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    options = shards(tmp_path, [row(1)], caption_column="captions", image_column="imag")
    with pytest.raises(
        Problems, match=r"image_column: split 'train' has no column 'imag'; .*did you mean 'image'\?"
    ) as r:
        new_task(options).prepare()
    assert len(r.value.messages) == 4  # two columns in each of two splits
    with pytest.raises(
        UserError, match=r"'parquet' has no split 'valid'; allowed: train, validation; did you mean 'val"
    ):
        new_task(shards(tmp_path, [row(1)], validation="valid")).prepare()
    with pytest.raises(UserError, match=r"data_files\.train: no file matches '/nowhere/\*\.parquet'"):
        materialise(DatasetSource(path="parquet", data_files={"train": "/nowhere/*.parquet"}))
    files = {"train": parquet(tmp_path / "dates.parquet", [row(1, caption=date(2014, 1, 1))])}
    with pytest.raises(UserError, match=r"found '2014-01-01' \(date\); allowed: text"):
        materialise(DatasetSource(path="parquet", data_files=files, validation="train"))
    files = {"train": parquet(tmp_path / "numbers.parquet", [row(1, image=5)])}
    with pytest.raises(UserError, match=r"image_column: 'image' holds no images|split 'train': cannot be read"):
        materialise(DatasetSource(path="parquet", data_files=files, validation="train"))


def test_a_data_set_the_hub_cannot_give_is_refused() -> None:
    with pytest.raises(UserError, match=r"dataset\.path: 'nobody/nothing' cannot be read: .*nobody/nothing"):
        materialise(DatasetSource(path="nobody/nothing"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "parqet"}, "'parqet' is neither a folder nor a hub id .*did you mean 'parquet'"),
        ({"path": "webdataset"}, "data_files: webdataset needs the files of each split"),
        ({"path": "a/b", "split": "train"}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_options_are_refused(options: Row, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DatasetSource.model_validate_json(json.dumps(options))
