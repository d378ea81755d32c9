"""Audio captioning with the files of AudioCaps or Clotho.

AudioCaps, https://github.com/cdjkim/audiocaps (train.csv, val.csv, test.csv; several rows of a clip are its captions):

    audiocap_id,youtube_id,start_time,caption
    97151,vfY_TJq7n_U,130,"Rustling occurs, ducks quack and water splashes, followed by an adult female and …"

Clotho, https://zenodo.org/records/4783391 (clotho_captions_development.csv, …_validation.csv, …_evaluation.csv):

    file_name,caption_1,caption_2,caption_3,caption_4,caption_5
    carpenter bee.wav,A flying bee is buzzing loudly around an object and its wing hits it.,…

The recordings are in one folder per split: ``train/``, ``val/``, ``test/`` or ``development/``, ``validation/``,
``evaluation/``.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.core.errors import ProblemList, UserError
from harness.core.paths import ExperimentPath
from tasks.base import Config, Example, Part, Split
from tasks.formats.audio_tables import AudioFiles, read_table, write_tone
from tasks.formats.data_files import MissingFileError, or_compressed, require_folder
from tasks.splits import FileTask

_log = logging.getLogger(__name__)

Layout = Literal["audiocaps", "clotho"]
# What the two data sets call the splits.
_NAMES: Mapping[Layout, Mapping[Split, str]] = {
    "audiocaps": {"train": "train", "validation": "val", "test": "test"},
    "clotho": {"train": "development", "validation": "validation", "test": "evaluation"},
}
_AUDIOCAPS_COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
_CLOTHO_CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))
_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3"})  # what libsndfile reads
# AudioCaps contains no recordings; these are the usual names of the downloaded ones.
_LOOKED_FOR: Mapping[Layout, str] = {
    "audiocaps": ", nor as {youtube_id}_{start_time}, Y{youtube_id} or {audiocap_id} (.wav, .flac, .ogg, .opus, .mp3)",
    "clotho": "",
}


class AudioCaptionsConfig(Config):
    """Where the captions and recordings are."""

    root: ExperimentPath
    layout: Literal["auto", "audiocaps", "clotho"] = "auto"  # auto: detected from the names of the CSV files
    csv_folder: Path = Path()  # of root, with the CSV files: dataset, clotho_csv_files
    audio_folder: Path = Path()  # of root, with the folders of the splits: audio_32000Hz, clotho_audio_files
    missing: Literal["error", "skip"] = "error"  # for clips without a file: many of AudioCaps' are no longer on YouTube


class AudioCaptions(FileTask):
    """Describe what is heard in a recording; the captions of several people are the references."""

    contexts = ("audio", "text")
    modalities: Mapping[str, str] = {"audio": "audio"}
    metrics = ("captions",)
    Config = AudioCaptionsConfig
    config: AudioCaptionsConfig

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """Sixteen tones with AudioCaps' files: eight to train on, four each to validate and test."""
        for number, (name, clips) in enumerate({"train": 8, "val": 4, "test": 4}.items()):
            (folder / name).mkdir()
            rows = [_AUDIOCAPS_COLUMNS]
            for clip in range(clips):
                youtube_id, pitch = f"{name[:3]}-{clip:07d}", ("low", "middle", "high", "shrill")[clip % 4]
                write_tone(folder / name / f"{youtube_id}.wav", 300 * (1 + clip % 4) + 40 * number + 10 * clip)
                captions = [f"A {pitch} tone sounds", f"Something beeps, {pitch} and short"]
                for caption in captions[: 1 if name == "train" else 2]:
                    rows.append((str(1000 * (number + 1) + len(rows)), youtube_id, "30", caption))
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
        return {"root": str(folder)}

    def annotation_files(self) -> list[Path] | None:
        """The tables of every split; None where clips are left out, which is told each time."""
        if self.config.missing == "skip":
            return None
        tables = self.root / self.config.csv_folder
        layout = self.config.layout if self.config.layout != "auto" else find_layout(tables)
        return [or_compressed(tables / _csv_name(layout, name)) for name in _NAMES[layout].values()]

    def read_splits(self, problems: ProblemList) -> Mapping[Split, list[Example]]:
        """The clips of a split in the order of their first captions."""
        require_folder(self.root, "captions and recordings")
        tables = self.root / self.config.csv_folder
        layout = self.config.layout if self.config.layout != "auto" else find_layout(tables)
        files = AudioFiles()
        splits: dict[Split, list[Example]] = {}
        for split, name in _NAMES[layout].items():
            table, folder = or_compressed(tables / _csv_name(layout, name)), self.root / self.config.audio_folder / name
            try:
                require_folder(folder, f"recordings for {split}")
                splits[split] = self._read(layout, table, folder, files, problems)
            except UserError as error:
                problems.add(error)
        return splits

    def _read(
        self, layout: Layout, table: Path, folder: Path, files: AudioFiles, problems: ProblemList
    ) -> list[Example]:
        """Read the table of one split and find its recordings."""
        clips = (_audiocaps if layout == "audiocaps" else _clotho)(table, folder, problems)
        examples = []
        missing = []
        for clip in clips:
            try:
                path = files.find(folder, clip.file, clip.where)
                parts = (Part("audio", path),)
                examples.append(Example(clip.id, parts, tuple(clip.captions), cluster=clip.video))
            except MissingFileError as error:
                missing.append(error)
            except UserError as error:
                problems.add(error)
        if self.config.missing == "error":
            for absence in missing:
                problems.add(f"{absence}{_LOOKED_FOR[layout]}; missing: skip omits such clips")
        elif missing:
            _log.warning("%s: %d of %d clips are not in %s: omitted", table, len(missing), len(clips), folder)
        return examples


def find_layout(folder: Path) -> Layout:
    """Detect the data set from the names of its tables.

    Raises:
        UserError: the tables of neither or of both are in the folder.
    """
    require_folder(folder, "CSV files")
    first = {layout: _csv_name(layout, names["train"]) for layout, names in _NAMES.items()}
    found = [layout for layout, name in first.items() if or_compressed(folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{folder}: {' and '.join(first.values())} are both present; choose one: layout: {found[0]}")
    present = sorted(path.name for path in folder.glob("*.csv"))
    raise UserError(
        f"{folder}: neither {first['audiocaps']} (audiocaps) nor {first['clotho']} (clotho); csv_folder sets where "
        f"they are; CSV files here: {', '.join(present[:10]) or 'none'}"
    )


def _csv_name(layout: Layout, name: str) -> str:
    return f"{name}.csv" if layout == "audiocaps" else f"clotho_captions_{name}.csv"


class _Clip(NamedTuple):
    where: str
    id: str
    file: str  # name in the folder of its split
    captions: list[str]
    video: str | None = None  # several clips may be cut from one


def _clotho(table: Path, folder: Path, problems: ProblemList) -> list[_Clip]:
    """One row for each clip; file names are not stripped, because some begin with a space, on disk too."""
    clips = []
    for row in read_table(table, ("file_name", *_CLOTHO_CAPTIONS), problems):
        try:
            captions = [row.text(column) for column in _CLOTHO_CAPTIONS]
        except UserError as error:
            problems.add(error)
            continue
        name = row.values["file_name"]
        clips.append(_Clip(f"{row.where}: file_name", f"{folder.name}/{name}", name, captions))
    return clips


def _audiocaps(table: Path, folder: Path, problems: ProblemList) -> list[_Clip]:
    """One row for each caption; a clip is a video and a start time, in the order of first rows."""
    rows_of: dict[tuple[str, str], list[tuple[str, str, str]]] = {}  # clip → place, audiocap_id, caption
    seen: dict[str, str] = {}
    for row in read_table(table, _AUDIOCAPS_COLUMNS, problems):
        try:
            number, video, start_s = (row.name(column) for column in _AUDIOCAPS_COLUMNS[:3])
            caption = row.text("caption")
            if number in seen:
                raise UserError(f"{row.where}: audiocap_id: {number} is already used: {seen[number]}; ids are unique")
        except UserError as error:
            problems.add(error)
            continue
        seen[number] = row.where
        rows_of.setdefault((video, start_s), []).append((row.where, number, caption))
    present = {path.stem: path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES}
    clips = []
    for (video, start_s), rows in rows_of.items():
        clip_id = f"{video}_{start_s}"
        stems = [clip_id, video, f"Y{video}", *(number for _, number, _ in rows)]
        file = next((present[stem] for stem in stems if stem in present), f"{video}.wav")
        clips.append(_Clip(f"{rows[0][0]}: youtube_id", clip_id, file, [caption for _, _, caption in rows], video))
    return clips
