"""The readers of AudioCaps and Clotho: small folders in their formats, whole, broken and with clips gone."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import soundfile

from harness.core.errors import Problems, UserError
from tasks.audio_captions import AudioCaptions
from tasks.base import Part, Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
AUDIOCAPS = ["audiocap_id", "youtube_id", "start_time", "caption"]
CLOTHO = ["file_name", *(f"caption_{number}" for number in range(1, 6))]


def task_of(root: Path, **options: Any) -> AudioCaptions:
    """The task with options as they arrive in a trial: by JSON, strictly, with every default written out."""
    config = AudioCaptions.Config.model_validate_json(json.dumps({"root": str(root), **options}), strict=True)
    return AudioCaptions(AudioCaptions.Config.model_validate_json(config.model_dump_json(), strict=True))


def problems(task: AudioCaptions) -> list[str]:
    with pytest.raises(UserError, match=r".") as caught:
        task.prepare()
    return list(caught.value.messages) if isinstance(caught.value, Problems) else [str(caught.value)]


def write(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # the reader of tables does not decode audio


def audiocaps(root: Path, name: str = "{youtube_id}.wav", audio: str = ".", tables: str = ".") -> None:
    """Two clips a split, in train with one caption each, otherwise with two in mixed order, as the real files are."""
    for number, split in enumerate(("train", "val", "test")):
        clips = {f"-{split}_aaaa": "30", f"{split}-bbbb_": "0"}
        rows = [
            [str(100 * number + 10 * turn + clip), video, start, f"Caption {turn} of {video}, quoted"]
            for turn in range(1 if split == "train" else 2)
            for clip, (video, start) in enumerate(clips.items())
        ]
        write(root / tables / f"{split}.csv", AUDIOCAPS, rows)
        for number_text, video, start, _ in rows:
            touch(root / audio / split / name.format(youtube_id=video, start_time=start, audiocap_id=number_text))


def clotho(root: Path, audio: str = ".", tables: str = ".") -> None:
    for split in ("development", "validation", "evaluation"):
        names = [" typical neighborhood in Porto.wav", "121006_rain&amp;storm.wav"]  # as in Clotho 2.1
        rows = [[name, *(f"{split} {name} {number}." for number in range(5))] for name in names]
        write(root / tables / f"clotho_captions_{split}.csv", CLOTHO, rows)
        for name in names:
            touch(root / audio / split / name)


@pytest.mark.parametrize(
    "name",
    [
        "{youtube_id}.wav",
        "Y{youtube_id}.wav",
        "{youtube_id}_{start_time}.flac",
        "{audiocap_id}.wav",
        "{youtube_id}.WAV",
        "{audiocap_id}.ogg",
    ],
)
def test_audiocaps_with_any_usual_name_of_its_files(tmp_path: Path, name: str) -> None:
    audiocaps(tmp_path, name)
    task = task_of(tmp_path)
    task.prepare()
    assert [[example.id for example in task.examples(split)] for split in SPLITS] == [
        [f"-{split}_aaaa_30", f"{split}-bbbb__0"] for split in ("train", "val", "test")
    ]
    first = task.examples("validation")[0]
    expected = name.format(youtube_id="-val_aaaa", start_time="30", audiocap_id="100")
    assert first.inputs == (Part("audio", tmp_path / "val" / expected),)
    assert first.references == ("Caption 0 of -val_aaaa, quoted", "Caption 1 of -val_aaaa, quoted")
    assert [len(example.references) for example in task.examples("train")] == [1, 1]


def test_a_clip_with_several_files_is_one_example(tmp_path: Path) -> None:
    audiocaps(tmp_path, "{audiocap_id}.wav")
    touch(tmp_path / "val" / "-val_aaaa_30.flac")
    first, second = task_of(tmp_path).examples("validation")
    assert [example.files[0][1].name for example in (first, second)] == ["-val_aaaa_30.flac", "101.wav"]


def test_clotho(tmp_path: Path) -> None:
    clotho(tmp_path)
    task = task_of(tmp_path)
    names = [" typical neighborhood in Porto.wav", "121006_rain&amp;storm.wav"]
    for split, folder in zip(SPLITS, ("development", "validation", "evaluation"), strict=True):
        examples = task.examples(split)
        assert [example.id for example in examples] == [f"{folder}/{name}" for name in names]
        assert [example.files for example in examples] == [(("audio", tmp_path / folder / name),) for name in names]
        assert examples[1].references == tuple(f"{folder} {names[1]} {number}." for number in range(5))


@pytest.mark.parametrize("data_set", [audiocaps, clotho])
def test_tables_and_recordings_in_folders_of_their_own(tmp_path: Path, data_set: Any) -> None:
    data_set(tmp_path, audio="some/audio", tables="csv files")
    task = task_of(tmp_path, audio_folder="some/audio", csv_folder="csv files")
    assert [len(task.examples(split)) for split in SPLITS] == [2, 2, 2]
    with pytest.raises(UserError, match=r"neither train\.csv \(audiocaps\) nor clotho_captions_development\.csv"):
        task_of(tmp_path, audio_folder="some/audio").prepare()
    told = problems(task_of(tmp_path, csv_folder="csv files"))
    assert len(told) == 3
    assert all("does not exist; " in message for message in told)


def test_both_data_sets_in_one_folder(tmp_path: Path) -> None:
    audiocaps(tmp_path)
    clotho(tmp_path)
    with pytest.raises(UserError, match=r"are both present; .* layout: audiocaps"):
        task_of(tmp_path).prepare()
    assert task_of(tmp_path, layout="clotho").examples("test")[0].id.startswith("evaluation/")
    assert task_of(tmp_path, layout="audiocaps").examples("test")[0].id == "-test_aaaa_30"


def test_missing_clips_are_an_error_unless_they_may_be_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audiocaps(tmp_path)
    for path in ("train/-train_aaaa.wav", "val/val-bbbb_.wav"):
        (tmp_path / path).unlink()
    first, second = problems(task_of(tmp_path))
    assert first == (
        f"{tmp_path}/train.csv: line 2: youtube_id: '-train_aaaa.wav' is not in {tmp_path}/train, "
        "nor as {youtube_id}_{start_time}, Y{youtube_id} or {audiocap_id} (.wav, .flac, .ogg, .opus, .mp3); "
        "missing: skip omits such clips"
    )
    assert second.startswith(f"{tmp_path}/val.csv: line 3: youtube_id: 'val-bbbb_.wav' is not in {tmp_path}/val")

    task = task_of(tmp_path, missing="skip")
    with caplog.at_level(logging.WARNING, logger="tasks.audio_captions"):
        task.prepare()
        assert [len(task.examples(split)) for split in SPLITS] == [1, 1, 2]
    assert [record.getMessage() for record in caplog.records] == [  # once, however often it is read
        f"{tmp_path}/{split}.csv: 1 of 2 clips are not in {tmp_path}/{split}: omitted" for split in ("train", "val")
    ]


def test_skipping_forgives_nothing_else(tmp_path: Path) -> None:
    audiocaps(tmp_path)
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no examples for train; every split needs at least one"):
        task_of(tmp_path, missing="skip").prepare()
    (tmp_path / "train").rmdir()
    with pytest.raises(UserError, match="train: the folder of recordings for train does not exist"):
        task_of(tmp_path, missing="skip").prepare()
    (tmp_path / "clotho").mkdir()
    clotho(tmp_path / "clotho")
    row = ["../validation/121006_rain&amp;storm.wav", *"abcde"]
    write(tmp_path / "clotho" / "clotho_captions_development.csv", CLOTHO, [row])
    with pytest.raises(UserError, match=r"line 2: file_name: '\.\./validation/.*' leads out of"):
        task_of(tmp_path / "clotho", missing="skip").prepare()


def test_all_that_is_wrong_with_audiocaps_is_told_at_once(tmp_path: Path) -> None:
    audiocaps(tmp_path)
    (tmp_path / "train" / "linked.wav").symlink_to(tmp_path / "elsewhere" / "gone")
    touch(tmp_path / "train" / "twice.wav")
    rows = [
        ["1", "-train_aaaa", "30", "fine"],
        ["1", "train-bbbb_", "0", "the same id"],
        ["2", "train-bbbb_", "0", " ... "],
        ["3", "", "0", "no video"],
        ["4", "linked", "0", "a link to nothing"],
        ["5", "../val/-val_aaaa", "0", "leads out"],
        ["6", "twice", "0", "a clip"],
        ["7", "twice", "10", "another clip of its video, for which the same file would be taken"],
    ]
    write(tmp_path / "train.csv", AUDIOCAPS, rows)
    (tmp_path / "val.csv").write_bytes(b"audiocap_id,youtube_id,start_time,caption\n1,-val_aaaa,30,caf\xe9\n")
    (tmp_path / "test.csv").write_text("audiocap_id,youtube,start_time,caption\n")
    table = f"{tmp_path}/train.csv: line"
    expected = [
        f"{table} 3: audiocap_id: 1 is already used: {table} 2; ids are unique",
        f"{table} 4: caption: found ' ... '; a text with a letter or digit is needed",
        f"{table} 5: youtube_id: found ''; a name is needed",
        f"{table} 7: youtube_id: '../val/-val_aaaa.wav' leads out of {tmp_path}/train; allowed: files inside it",
        f"{table} 9: youtube_id: 'twice.wav' is already listed: {table} 8: youtube_id; a file may be listed once",
        f"{table} 6: youtube_id: 'linked.wav' is not in {tmp_path}/train; it is a link to {tmp_path}/elsewhere/gone, "
        "nor as {youtube_id}_{start_time}, Y{youtube_id} or {audiocap_id} (.wav, .flac, .ogg, .opus, .mp3); missing: "
        "skip omits such clips",
        f"{tmp_path}/val.csv: line 2: not UTF-8 (byte 0xe9); save the file as UTF-8",
        f"{tmp_path}/test.csv: line 1: no column 'youtube_id'; allowed: audiocap_id, caption, start_time, youtube; "
        "did you mean 'youtube'?",
    ]
    assert problems(task_of(tmp_path)) == expected


def test_a_clip_in_two_splits_is_refused(tmp_path: Path) -> None:
    audiocaps(tmp_path)
    touch(tmp_path / "test" / "-val_aaaa.wav")
    with (tmp_path / "test.csv").open("a") as file:
        file.write("999,-val_aaaa,30,The same clip once more\n")
    with pytest.raises(UserError, match=r"'-val_aaaa_30' is in validation and again in test; ids are unique"):
        task_of(tmp_path).prepare()


def test_a_broken_clotho(tmp_path: Path) -> None:
    clotho(tmp_path)
    name = "121006_rain&amp;storm.wav"
    write(
        tmp_path / "clotho_captions_development.csv", CLOTHO, [[name, *"abcd", ""], [name, *"abcde"], [name, *"abcde"]]
    )
    write(tmp_path / "clotho_captions_validation.csv", [*CLOTHO[:5], "caption5"], [[name, *"abcde"]])
    (tmp_path / "clotho_captions_evaluation.csv").unlink()
    table = f"{tmp_path}/clotho_captions_development.csv: line"
    assert problems(task_of(tmp_path)) == [
        f"{table} 2: caption_5: found ''; a text with a letter or digit is needed",
        f"{table} 4: file_name: '{name}' is already listed: {table} 3: file_name; a file may be listed once",
        f"{tmp_path}/clotho_captions_validation.csv: line 1: no column 'caption_5'; allowed: caption5, caption_1, "
        "caption_2, caption_3, caption_4, file_name; did you mean 'caption5'?",
        f"{tmp_path}/clotho_captions_evaluation.csv: cannot be read: No such file or directory",
    ]


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audiocaps(tmp_path)

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # chmod does not stop root, who runs tests in containers
    with pytest.raises(UserError, match=r"/train: cannot be read: Permission denied"):
        task_of(tmp_path).prepare()


def test_the_sample_is_audio_with_several_captions_to_score_by(tmp_path: Path) -> None:
    task = task_of(Path(AudioCaptions.sample(tmp_path)["root"]))
    assert [len(task.examples(split)) for split in SPLITS] == [8, 4, 4]
    assert {len(example.references) for example in task.examples("test")} == {2}
    frames = {soundfile.info(example.files[0][1]).frames for split in SPLITS for example in task.examples(split)}
    assert frames == {1600}
