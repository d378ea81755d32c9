"""Speech recognition: any folder of recordings with transcripts, in one of three layouts.

``audiofolder``, https://huggingface.co/docs/datasets/audio_dataset#audiofolder:

    root/train/metadata.csv                       (or .jsonl; or one of them in root, naming train/0001.wav)
        file_name,transcription
        0001.wav,"Znowu się duch z ciałem zrośnie w młodocianej wstaniesz wiosnie."

``librispeech``, https://www.openslr.org/12:

    root/train-clean-100/84/121123/84-121123-0000.flac
    root/train-clean-100/84/121123/84-121123.trans.txt
        84-121123-0000 GO DO YOU HEAR

``fsdd``, https://github.com/Jakobovski/free-spoken-digit-dataset:

    root/recordings/7_jackson_32.wav              (digit, speaker, index)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from harness.core.errors import ProblemList, UserError, did_you_mean
from harness.core.paths import ExperimentPath
from tasks.base import Config, Example, Part, Split
from tasks.containers.text_files import folder_looks_like, read_text
from tasks.formats.audio_tables import AudioFiles, read_table, spoken_text, write_tone
from tasks.formats.data_files import require_folder
from tasks.splits import SPLITS, FileTask

# The names that Hugging Face's audiofolder knows for a split (datasets.data_files.SPLIT_KEYWORDS).
SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FSDD_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>.+)_(?P<index>\d+)\.wav")

Layout = Literal["audiofolder", "librispeech", "fsdd"]
Splits = dict[Split, list[Example]]


class SpeechConfig(Config):
    """Where the recordings are, and which of them form each split."""

    root: ExperimentPath  # holds metadata.csv or train/ …, or train-clean-100/ …, or recordings/
    layout: Literal["auto", "audiofolder", "librispeech", "fsdd"] = "auto"  # auto: detected from the files in root
    text_column: str = "transcription"  # audiofolder: the column of the transcript
    speaker_column: str | None = None  # audiofolder without split folders: keeps each speaker in one split
    validation_speakers: tuple[str, ...] = ()  # fsdd, or with speaker_column; empty: chosen, see docs/tasks/speech.md
    test_speakers: tuple[str, ...] = ()
    train: tuple[str, ...] = ("train-clean-100",)  # librispeech: folders of root
    validation: tuple[str, ...] = ("dev-clean",)
    test: tuple[str, ...] = ("test-clean",)
    # librispeech: its transcripts are all upper case, which takes a language model about twice the tokens.
    lower_case: bool = True


_OPTIONS_OF: Mapping[Layout, frozenset[str]] = {
    "audiofolder": frozenset({"text_column", "speaker_column", "validation_speakers", "test_speakers"}),
    "librispeech": frozenset({"train", "validation", "test", "lower_case"}),
    "fsdd": frozenset({"validation_speakers", "test_speakers"}),
}


class Speech(FileTask):
    """Transcribe a recording."""

    contexts = ("audio", "text")
    modalities: Mapping[str, str] = {"audio": "audio"}
    metrics = ("error_rate", "exact_match")
    Config = SpeechConfig
    config: SpeechConfig

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """Sixteen tones named like spoken digits: two speakers to train on, one each to validate and test."""
        (folder / "recordings").mkdir()
        for number, speaker in enumerate(("ann", "bob", "cem", "dee")):
            for digit in range(4):
                write_tone(folder / "recordings" / f"{digit}_{speaker}_0.wav", 300 + 200 * digit + 20 * number)
        return {"root": str(folder)}

    def annotation_files(self) -> list[Path] | None:
        """The tables of an audiofolder; in the other layouts folders and small files say what there is."""
        layout = self.config.layout if self.config.layout != "auto" else find_layout(self.root)
        return _tables(self.root) if layout == "audiofolder" else None

    def read_splits(self, problems: ProblemList) -> Splits:
        """The recordings of a split in the order of their table, or of their names."""
        require_folder(self.root, "recordings")
        layout = self.config.layout if self.config.layout != "auto" else find_layout(self.root)
        _check_options(self.config, layout)
        splits = _READERS[layout](self.root, self.config, AudioFiles(), problems)
        return {split: _several_speakers(examples) for split, examples in splits.items()}


def _several_speakers(examples: list[Example]) -> list[Example]:
    """Without clusters if there is one speaker: then it is a condition of the test, and what varies is the recording.

    Of several speakers each is a cluster: how well one is understood is alike in all its recordings.
    """
    several = len({example.cluster for example in examples}) > 1
    return examples if several else [replace(example, cluster=None) for example in examples]


def find_layout(root: Path) -> Layout:
    """Detect the layout of a folder from its content.

    Raises:
        UserError: no layout fits, or several do.
    """
    found: list[Layout] = []
    if _tables(root):
        found.append("audiofolder")
    if next(root.glob("*/*/*/*.trans.txt"), None):
        found.append("librispeech")
    if (root / "recordings").is_dir():
        found.append("fsdd")
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{root}: could be {' or '.join(found)}; choose one: layout: {found[0]}")
    raise UserError(
        f"{root}: no known layout: no metadata.csv or metadata.jsonl in it or in its folders (audiofolder), no "
        "train-clean-100/84/121123/84-121123.trans.txt or the like (librispeech), no recordings/ (fsdd); it holds "
        f"{', '.join(sorted(entry.name for entry in root.iterdir())[:10]) or 'nothing'}{folder_looks_like(root)}"
    )


def _check_options(config: SpeechConfig, layout: Layout) -> None:
    """Reject options that would silently be ignored."""
    usable = _OPTIONS_OF[layout]
    if layout == "audiofolder" and config.speaker_column is None:
        usable -= {"validation_speakers", "test_speakers"}
    for option, field in SpeechConfig.model_fields.items():
        if option not in {"root", "layout", *usable} and getattr(config, option) != field.default:
            raise UserError(f"{option}: not an option of layout {layout}; {did_you_mean(option, usable)}")


def _tables(root: Path) -> list[Path]:
    """The metadata files of an audiofolder: in root, or one in each of its folders."""
    return sorted(
        path
        for pattern in ("metadata.csv", "metadata.jsonl", "*/metadata.csv", "*/metadata.jsonl")
        for packed in ("", ".gz")
        for path in root.glob(pattern + packed)
    )


class _Recording(NamedTuple):
    where: str
    speaker: str
    example: Example


def read_audiofolder(root: Path, config: SpeechConfig, files: AudioFiles, problems: ProblemList) -> Splits:
    """Read the recordings that metadata files name; their first folder is the split, or they are divided.

    Raises:
        UserError: there is no metadata file, or there are too many, or only some recordings are in split folders.
    """
    tables = _tables(root)
    folders = [table.parent for table in tables]
    if not tables:
        raise UserError(f"{root}: no metadata.csv or metadata.jsonl in it or in train/, validation/, test/")
    if (root in folders and len(tables) > 1) or len(set(folders)) < len(tables):
        names = ", ".join(str(table.relative_to(root)) for table in tables)
        raise UserError(f"{root}: several metadata files: {names}; allowed: one in the root, or one in each folder")
    columns = ["file_name", config.text_column, *filter(None, [config.speaker_column])]
    recordings = []
    for table in tables:
        if table.parent != root and table.parent.name not in SPLIT_NAMES:
            problems.add(f"{table}: its folder is not a split; {did_you_mean(table.parent.name, SPLIT_NAMES)}")
            continue
        for row in read_table(table, columns, problems):
            try:
                path = files.find(table.parent, str(row.values["file_name"]), f"{row.where}: file_name")
                example_id = path.relative_to(root).as_posix()
                text = row.text(config.text_column)
                speaker = row.name(config.speaker_column) if config.speaker_column else ""
                example = Example(example_id, (Part("audio", path),), (text,), cluster=speaker or None)
                recordings.append(_Recording(row.where, speaker, example))
            except UserError as error:
                problems.add(error)
    return _divided(root, config, recordings)


def _divided(root: Path, config: SpeechConfig, recordings: list[_Recording]) -> Splits:
    """Assign each recording to a split by its folder, else by its speaker if a column gives it, else by its name."""
    folders = [SPLIT_NAMES.get(PurePosixPath(recording.example.id).parts[0]) for recording in recordings]
    if any(folders):
        if None in folders:
            where, _, example = recordings[folders.index(None)]
            raise UserError(
                f"{where}: {example.id!r} is not in a split folder, but others are; allowed: {', '.join(SPLIT_NAMES)}"
            )
        if config.speaker_column is not None:
            raise UserError(
                f"speaker_column: the folders of {root} already define the splits; allowed: no speaker_column"
            )
    named = _named_speakers(root, config, [recording.speaker for recording in recordings])
    splits: Splits = {split: [] for split in SPLITS}
    for (_, speaker, example), folder in zip(recordings, folders, strict=True):
        splits[folder or named.get(speaker) or split_by_hash(speaker or example.id)].append(example)
    return splits


def split_by_hash(key: str) -> Split:
    """80 % train, 10 % validation, 10 % test, by a hash; adding recordings moves no other one to another split."""
    tenth = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def _named_speakers(root: Path, config: SpeechConfig, speakers: Iterable[str]) -> dict[str, Split]:
    """The split of every speaker by ``validation_speakers`` and ``test_speakers``; empty if neither is given."""
    named: dict[str, Split] = {}
    if not config.validation_speakers and not config.test_speakers:
        return named
    known = set(speakers) - {""}
    chosen: Mapping[Split, tuple[str, ...]] = {"validation": config.validation_speakers, "test": config.test_speakers}
    for split, names in chosen.items():
        option = f"{split}_speakers"
        if not names:
            raise UserError(f"{option}: found none; set both validation_speakers and test_speakers, or neither")
        for name in names:
            if name not in known:
                raise UserError(f"{option}: {name!r} is not a speaker of {root}; {did_you_mean(name, known)}")
            if name in named:
                raise UserError(f"{option}: {name!r} is listed twice; no speaker may be in two splits")
            named[name] = split
    return {speaker: named.get(speaker, "train") for speaker in known}


def read_librispeech(root: Path, config: SpeechConfig, files: AudioFiles, problems: ProblemList) -> Splits:
    """Read the chapters of each split's folders, in the order of their paths."""
    splits: Splits = {split: [] for split in SPLITS}
    for split in SPLITS:
        for name in getattr(config, split):
            try:
                require_folder(root / name, split)
            except UserError as error:
                problems.add(error)
                continue
            for table in sorted((root / name).glob("*/*/*.trans.txt")):
                splits[split] += _chapter(table, config.lower_case, files, problems)
    return splits


def _chapter(table: Path, lower_case: bool, files: AudioFiles, problems: ProblemList) -> list[Example]:
    """Read the utterances of one chapter; recordings and lines correspond one to one."""
    examples = []
    try:
        lines = read_text(table).split("\n")
    except UserError as error:
        problems.add(error)
        return []
    unlisted = {path.stem for path in table.parent.glob("*.flac")}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        utterance, _, text = line.partition(" ")
        unlisted.discard(utterance)
        try:
            where = f"{table}: line {number}"
            path = files.find(table.parent, f"{utterance}.flac", where)
            text = spoken_text(text.lower() if lower_case else text, where)
            speaker = table.parent.parent.name
            examples.append(Example(utterance, (Part("audio", path),), (text,), cluster=speaker))
        except UserError as error:
            problems.add(error)
    for stem in sorted(unlisted):
        problems.add(f"{table}: no line for {stem}.flac in the same folder")
    return examples


def read_fsdd(root: Path, config: SpeechConfig, files: AudioFiles, problems: ProblemList) -> Splits:
    """Read the recordings in the order of their names; no speaker is in two splits.

    Raises:
        UserError: there are fewer than three speakers, or the options name an unknown one.
    """
    folder = root / "recordings"
    require_folder(folder, "recordings")
    recordings = []
    for name in sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".wav"):
        where = str(folder / name)
        try:
            match = _FSDD_NAME.fullmatch(name)
            if not match:
                raise UserError(f"{where}: the name is not {{digit}}_{{speaker}}_{{index}}.wav, as in 7_jackson_32.wav")
            path = files.find(folder, name, where)
        except UserError as error:
            problems.add(error)
            continue
        text, speaker = DIGITS[int(match["digit"])], match["speaker"]
        example = Example(path.stem, (Part("audio", path),), (text,), cluster=speaker)
        recordings.append(_Recording(where, speaker, example))

    speakers = sorted({recording.speaker for recording in recordings})
    if len(speakers) < 3:
        raise UserError(
            f"{folder}: speakers found: {', '.join(speakers) or 'none'}; at least three are needed, one per split"
        )
    named = _named_speakers(root, config, speakers)
    if not named:
        named = {**dict.fromkeys(speakers, "train"), speakers[-2]: "validation", speakers[-1]: "test"}
    splits: Splits = {split: [] for split in SPLITS}
    for _, speaker, example in recordings:
        splits[named[speaker]].append(example)
    return splits


_READERS = {"audiofolder": read_audiofolder, "librispeech": read_librispeech, "fsdd": read_fsdd}
