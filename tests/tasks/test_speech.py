"""The speech reader: small folders in its three layouts, with all common errors, and real FSDD."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import Problems, UserError
from tasks.base import Part, Split
from tasks.speech import DIGITS, Speech, split_by_hash

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def speech(root: Path, **options: Any) -> Speech:
    """The task with options as they arrive in a trial: by JSON, strictly, with every default written out."""
    config = Speech.Config.model_validate_json(json.dumps({"root": str(root), **options}), strict=True)
    return Speech(Speech.Config.model_validate_json(config.model_dump_json(), strict=True))


def ids(task: Speech) -> dict[str, list[str]]:
    return {split: [example.id for example in task.examples(split)] for split in SPLITS}


def problems(task: Speech) -> str:
    """Everything that is wrong with a data set, one message a line."""
    with pytest.raises(UserError, match=r".") as caught:
        task.prepare()
    return "\n".join(caught.value.messages) if isinstance(caught.value, Problems) else str(caught.value)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")  # the reader of tables does not decode audio
    return path


def write_csv(path: Path, header: list[str], rows: Iterable[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def audiofolder(root: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        rows = [[f"{name}{number}.wav", f"Said {number}."] for number in range(count)]
        write_csv(root / name / "metadata.csv", ["file_name", "transcription"], rows)
        for file, _ in rows:
            touch(root / name / file)


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("training", "dev", "eval")])
def test_split_folders_with_a_table_each(tmp_path: Path, names: tuple[str, str, str]) -> None:
    audiofolder(tmp_path, dict(zip(names, (3, 2, 1), strict=True)))
    task = speech(tmp_path)
    assert [len(task.examples(split)) for split in SPLITS] == [3, 2, 1]
    first = task.examples("train")[0]
    assert (first.id, first.references) == (f"{names[0]}/{names[0]}0.wav", ("Said 0.",))
    assert first.inputs == (Part("audio", tmp_path / first.id),)


def test_one_table_in_the_root_that_names_split_folders(tmp_path: Path) -> None:
    names = ["train/b.wav", "train/a.wav", "dev/c.wav", "test/deep/d.wav"]
    write_csv(tmp_path / "metadata.csv", ["sentence", "file_name"], [[f"it is {name}", name] for name in names])
    for name in names:
        touch(tmp_path / name)
    task = speech(tmp_path, text_column="sentence")
    assert ids(task) == {"train": names[:2], "validation": names[2:3], "test": names[3:]}
    assert task.examples("test")[0].references == ("it is test/deep/d.wav",)


def test_json_lines(tmp_path: Path) -> None:
    for split in SPLITS:
        row = {"file_name": "a.flac", "transcription": f"the {split} one"}
        touch(tmp_path / split / "a.flac").with_name("metadata.jsonl").write_text(json.dumps(row))
    task = speech(tmp_path)
    assert [task.examples(split)[0].references for split in SPLITS] == [(f"the {split} one",) for split in SPLITS]


def flat(root: Path, rows: list[list[str]]) -> None:
    write_csv(root / "metadata.csv", ["file_name", "transcription", "speaker"], rows)
    for row in rows:
        touch(root / row[0])


def test_a_flat_folder_is_divided_by_a_hash_of_the_id(tmp_path: Path) -> None:
    rows = [[f"clips/{number}.wav", "a word", "me"] for number in range(400)]
    flat(tmp_path, rows)
    found = ids(speech(tmp_path))
    assert sorted(name for names in found.values() for name in names) == sorted(row[0] for row in rows)
    assert all(split_by_hash(name) == split for split, names in found.items() for name in names)
    assert 0.7 < len(found["train"]) / 400 < 0.9
    assert min(len(found["validation"]), len(found["test"])) > 20
    flat(tmp_path, rows[:300])  # added files do not move others to another split
    fewer = ids(speech(tmp_path))
    assert all(set(fewer[split]) <= set(found[split]) for split in SPLITS)


def test_a_flat_folder_is_divided_by_speakers(tmp_path: Path) -> None:
    speaker_of = {f"{number}.wav": f"speaker {number % 60}" for number in range(180)}
    flat(tmp_path, [[name, "a word", speaker] for name, speaker in speaker_of.items()])

    def heard(**options: Any) -> dict[str, set[str]]:
        found = ids(speech(tmp_path, speaker_column="speaker", **options))
        return {split: {speaker_of[name] for name in names} for split, names in found.items()}

    by_hash = heard()
    assert all(by_hash.values())
    assert sum(map(len, by_hash.values())) == 60  # no speaker twice
    by_name = heard(validation_speakers=["speaker 1"], test_speakers=["speaker 2", "speaker 3"])
    assert (by_name["validation"], by_name["test"]) == ({"speaker 1"}, {"speaker 2", "speaker 3"})
    assert len(by_name["train"]) == 57


def test_speakers_may_be_numbers_in_json(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.wav", "transcription": "yes", "id": n} for n in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for n in range(3):
        touch(tmp_path / f"{n}.wav")
    task = speech(tmp_path, speaker_column="id", validation_speakers=["1"], test_speakers=["0"])
    assert ids(task) == {"train": ["2.wav"], "validation": ["1.wav"], "test": ["0.wav"]}


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    audiofolder(tmp_path, {"train": 1, "validation": 1, "test": 1})
    rows = [["train0.wav", "fine"], ["gone.wav", "no file"], ["train0.wav", "again"], ["../test/test0.wav", "dots"]]
    write_csv(tmp_path / "train" / "metadata.csv", ["file_name", "transcription"], rows)
    write_csv(tmp_path / "dev" / "metadata.csv", ["file_name", "transcript"], [["a.wav", "b"]])
    write_csv(tmp_path / "test" / "metadata.csv", ["file_name", "transcription"], [["test0.wav", " ?! "]])
    table = f"{tmp_path}/train/metadata.csv"
    assert problems(speech(tmp_path)).split("\n") == [
        f"{tmp_path}/dev/metadata.csv: line 1: no column 'transcription'; allowed: file_name, transcript; "
        "did you mean 'transcript'?",
        f"{tmp_path}/test/metadata.csv: line 2: transcription: found ' ?! '; a text with a letter or digit is needed",
        f"{table}: line 3: file_name: 'gone.wav' is not in {tmp_path}/train",
        f"{table}: line 4: file_name: 'train0.wav' is already listed: {table}: line 2: file_name; "
        "a file may be listed once",
        f"{table}: line 5: file_name: '../test/test0.wav' leads out of {tmp_path}/train; allowed: files inside it",
    ]


def test_folders_and_tables_that_do_not_fit(tmp_path: Path) -> None:
    audiofolder(tmp_path, {"train": 1, "validaton": 1, "test": 1})
    assert "validaton/metadata.csv: its folder is not a split; " in (told := problems(speech(tmp_path)))
    assert "did you mean 'validation'?" in told
    (tmp_path / "validaton").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "metadata.csv").unlink()
    with pytest.raises(UserError, match="no examples for validation; every split needs at least one"):
        speech(tmp_path).prepare()
    (tmp_path / "train" / "metadata.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"several metadata files: .*train/metadata\.csv, train/metadata\.jsonl"):
        speech(tmp_path).prepare()


def test_split_folders_and_a_division_by_options_exclude_each_other(tmp_path: Path) -> None:
    audiofolder(tmp_path, {"train": 1, "validation": 1, "test": 1})
    with pytest.raises(UserError, match=r"no column 'speaker'"):
        speech(tmp_path, speaker_column="speaker").prepare()
    with pytest.raises(UserError, match=r"test_speakers: not an option of layout audiofolder; allowed: speaker_column"):
        speech(tmp_path, test_speakers=["a"]).prepare()
    with pytest.raises(UserError, match=r"speaker_column: the folders of .* already define the splits"):
        speech(tmp_path, speaker_column="transcription").prepare()
    other = tmp_path / "other"
    flat(other, [["train/a.wav", "x", "me"], ["b.wav", "x", "me"]])
    with pytest.raises(UserError, match=r"metadata\.csv: line 3: 'b\.wav' is not in a split folder"):
        speech(other).prepare()


def librispeech(root: Path, folders: Iterable[str]) -> None:
    for number, folder in enumerate(folders):
        chapter = root / folder / f"{80 + number}" / "121123"
        stem = f"{80 + number}-121123"
        touch(chapter / f"{stem}-0000.flac")
        touch(chapter / f"{stem}-0001.flac")
        lines = [f"{stem}-0000 GO DO YOU HEAR", f"{stem}-0001 IT'S {folder.upper()}"]
        (chapter / f"{stem}.trans.txt").write_text("\n".join(lines) + "\n")


def test_librispeech(tmp_path: Path) -> None:
    librispeech(tmp_path, ["train-clean-100", "train-other-500", "dev-clean", "test-clean"])
    task = speech(tmp_path)
    assert ids(task) == {
        "train": ["80-121123-0000", "80-121123-0001"],
        "validation": ["82-121123-0000", "82-121123-0001"],
        "test": ["83-121123-0000", "83-121123-0001"],
    }
    first, second = task.examples("train")
    assert first.references == ("go do you hear",)
    assert second.inputs == (Part("audio", tmp_path / "train-clean-100/80/121123/80-121123-0001.flac"),)
    both = speech(tmp_path, train=["train-clean-100", "train-other-500"], lower_case=False)
    assert [example.references[0] for example in both.examples("train")][1:3] == [
        "IT'S TRAIN-CLEAN-100",
        "GO DO YOU HEAR",
    ]


def test_a_broken_librispeech(tmp_path: Path) -> None:
    librispeech(tmp_path, ["train-clean-100", "dev-clean", "test-clean"])
    chapter = tmp_path / "train-clean-100" / "80" / "121123"
    (chapter / "80-121123.trans.txt").write_text(
        "80-121123-0000 GO\n80-121123-0000 AGAIN\n80-121123-0002 GONE\n../../x UP\n80-121123-0003\n"
    )
    touch(chapter / "80-121123-0003.flac")
    (tmp_path / "dev-clean" / "81" / "121123" / "81-121123.trans.txt").write_bytes(b"81-121123-0000 \xe9\n")
    found = problems(speech(tmp_path, test=["test-claen"])).split("\n")
    table = f"{chapter}/80-121123.trans.txt"
    expected = [
        f"{table}: line 2: '80-121123-0000.flac' is already listed: {table}: line 1;",
        f"{table}: line 3: '80-121123-0002.flac' is not in {chapter}",
        f"{table}: line 4: '../../x.flac' leads out of {tmp_path}",
        f"{table}: line 5: found ''; a text with a letter or digit is needed",
        f"{table}: no line for 80-121123-0001.flac in the same folder",
        "81-121123.trans.txt: line 1: not UTF-8 (byte 0xe9)",
        "test-claen: the folder of test does not exist; ",
    ]
    assert len(found) == len(expected)
    assert all(part in message for part, message in zip(expected, found, strict=True))
    assert "did you mean 'test-clean'?" in found[-1]


def test_a_folder_in_two_splits_is_refused(tmp_path: Path) -> None:
    librispeech(tmp_path, ["train-clean-100", "dev-clean", "test-clean"])
    with pytest.raises(UserError, match=r"82-121123-0000\.flac' is already listed: .*82-121123\.trans\.txt: line 1"):
        speech(tmp_path, validation=["test-clean"]).prepare()


def fsdd(root: Path, speakers: Iterable[str]) -> Path:
    for speaker in speakers:
        for digit in (7, 0):
            touch(root / "recordings" / f"{digit}_{speaker}_12.wav")
    return root / "recordings"


def test_fsdd_is_divided_by_speakers(tmp_path: Path) -> None:
    touch(fsdd(tmp_path, ["theo", "jackson", "mary_ann", "bo"]) / "README.md")
    task = speech(tmp_path)
    assert ids(task) == {
        "train": ["0_bo_12", "0_jackson_12", "7_bo_12", "7_jackson_12"],
        "validation": ["0_mary_ann_12", "7_mary_ann_12"],
        "test": ["0_theo_12", "7_theo_12"],
    }
    assert [example.references for example in task.examples("test")] == [("zero",), ("seven",)]
    task = speech(tmp_path, validation_speakers=["bo", "theo"], test_speakers=["jackson"])
    assert ids(task)["validation"] == ["0_bo_12", "0_theo_12", "7_bo_12", "7_theo_12"]
    assert ids(task)["train"] == ["0_mary_ann_12", "7_mary_ann_12"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"validation_speakers": ["bo"], "test_speakers": ["teo"]},
            r"test_speakers: 'teo' is not a speaker of .*'theo'\?",
        ),
        ({"test_speakers": ["theo"]}, r"validation_speakers: found none; .* validation_speakers and test_speakers"),
        ({"validation_speakers": ["bo"], "test_speakers": ["bo"]}, r"test_speakers: 'bo' is listed twice"),
        ({"validation_speakers": ["bo"], "test_speakers": ["jackson", "theo"]}, r"no examples for train"),
        (
            {"text_column": "text"},
            r"text_column: not an option of layout fsdd; allowed: test_speakers, validation_speakers",
        ),
        ({"layout": "librispeech"}, r"train-clean-100: the folder of train does not exist"),
        ({"layout": "audiofolder"}, r"no metadata\.csv or metadata\.jsonl in it"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    fsdd(tmp_path, ["theo", "jackson", "bo"])
    with pytest.raises(UserError, match=message):
        speech(tmp_path, **options).prepare()


def test_a_broken_fsdd(tmp_path: Path) -> None:
    folder = fsdd(tmp_path, ["a", "b"])
    touch(folder / "seven_b_1.wav")
    (folder / "1_a_1.wav").symlink_to(folder / "7_a_12.wav")
    told = problems(speech(tmp_path))
    assert "seven_b_1.wav: the name is not {digit}_{speaker}_{index}.wav, as in 7_jackson_32.wav" in told
    assert "'7_a_12.wav' is already listed: " in told
    assert "speakers found: a, b; at least three are needed" in told


def test_no_layout_or_two(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no known layout: .* it holds nothing"):
        speech(tmp_path).prepare()
    with pytest.raises(UserError, match=f"{tmp_path.name}/gone: the folder of recordings does not exist"):
        speech(tmp_path / "gone").prepare()
    fsdd(tmp_path, ["a", "b", "c"])
    audiofolder(tmp_path, {"train": 1})
    with pytest.raises(UserError, match=r"could be audiofolder or fsdd; .* layout: audiofolder"):
        speech(tmp_path).prepare()
    assert len(speech(tmp_path, layout="fsdd").examples("train")) == 2


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fsdd(tmp_path, ["a", "b", "c"])

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # chmod does not stop root, who runs tests in containers
    with pytest.raises(UserError, match=f"{folder}: cannot be read: Permission denied"):
        speech(tmp_path).prepare()
    monkeypatch.undo()
    (tmp_path / "metadata.csv").mkdir()
    with pytest.raises(UserError, match=r"metadata\.csv: cannot be read: Is a directory"):
        speech(tmp_path, layout="audiofolder").prepare()


def test_the_sample_is_audio(tmp_path: Path) -> None:
    import soundfile

    task = speech(**{**(options := Speech.sample(tmp_path)), "root": Path(options["root"])})
    assert [len(task.examples(split)) for split in SPLITS] == [8, 4, 4]
    for split in SPLITS:
        for example in task.examples(split):
            info = soundfile.info(example.files[0][1])
            assert (info.samplerate, info.channels, info.frames) == (8000, 1, 1600)


@pytest.mark.real_data
def test_real_spoken_digits() -> None:
    if "FSDD_ROOT" not in os.environ:
        pytest.skip("FSDD_ROOT is not set: the folder that holds the recordings/ of the Free Spoken Digit Dataset")
    import soundfile

    task = speech(Path(os.environ["FSDD_ROOT"]))
    task.prepare()
    speakers = {}
    count = 0
    for split in SPLITS:
        examples = task.examples(split)
        count += len(examples)
        speakers[split] = {example.id.split("_")[1] for example in examples}
        for example in examples:
            path = example.files[0][1]
            assert example.references == (DIGITS[int(path.name[0])],)
        assert all(0.1 < soundfile.info(example.files[0][1]).duration < 3 for example in examples[:20])
    assert count == 1200
    assert speakers == {
        "train": {"george", "jackson", "lucas", "nicolas"},
        "validation": {"theo"},
        "test": {"yweweler"},
    }
