# ruff: noqa: E501 - one wrong input per line reads as a table
"""Real-world input is either read correctly and reported, or refused before training with the name of the file.

Each case runs ``harness prepare --check`` and the checks that ``harness run`` makes first.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch._dynamo  # before a user imports it who cannot read the interpreter's files
import yaml
from PIL import Image
from rich.console import Console

from harness.core.errors import UserError
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.model.batches import text_key
from harness.model.build import build
from harness.sweep.preflight import check_data
from tasks.captioning import CocoCaptions
from tasks.modalities import image as image_module
from tasks.speech import Speech
from tests.support.preparing import checked

Change = Callable[[Path], object]
NOBODY = 65534


def spec_of(task: str, root: Path, **sections: Any) -> TrialSpec:
    content = {"task": {"name": task, "root": str(root)}, "adapters": [{"method": "none", "learning_rate": 1e-3}]}
    path = root.parent / "experiment.yaml"
    path.write_text(yaml.safe_dump(content | sections), encoding="utf-8")
    (spec,) = expand(Experiment.from_yaml(path))
    return spec


def preflight(task: str, root: Path) -> None:
    """What ``harness run`` does before it starts a trial."""
    (root.parent / "run").mkdir(exist_ok=True)
    check_data([spec_of(task, root)], root.parent / "run", Console(file=io.StringIO()))


def assert_refused(task: str, root: Path, *says: str) -> None:
    fine, text = checked(task, f"root={root}")
    assert not fine
    with pytest.raises(UserError, match=re.escape(says[0])) as refusal:
        preflight(task, root)
    for words in says:
        assert words in text
        assert words in str(refusal.value)


def assert_read(task: str, root: Path, *remarks: str) -> None:
    fine, text = checked(task, f"root={root}")
    assert fine
    assert "no problems found" in text
    for remark in remarks:
        assert remark in text
    preflight(task, root)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Sixteen small pictures with two captions each."""
    root = tmp_path / "coco"
    root.mkdir()
    CocoCaptions.sample(root)
    return root


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Sixteen short tones named like spoken digits."""
    root = tmp_path / "digits"
    root.mkdir()
    Speech.sample(root)
    return root


def picture(root: Path) -> Path:
    """One of the training files."""
    return root / "train2017" / f"{3:012d}.jpg"


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def truncated_picture(root: Path) -> None:
    Image.effect_noise((64, 64), 50).save(picture(root))
    cut_in_half(picture(root))


def dangling_link(root: Path) -> None:
    picture(root).unlink()
    picture(root).symlink_to(root.parent / "gone.jpg")


def set_first(part: str, **values: Any) -> Change:
    return lambda root: edit(root, lambda content: content[part][0].update(values))


# A change of the folder, and parts of both messages.
BROKEN_PICTURES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing": (lambda root: picture(root).unlink(), ("captions_train2017.json: images[3].file_name: '000000000003.jpg' is not in",)),
    "empty file": (lambda root: picture(root).write_bytes(b""), ("000000000003.jpg: ",)),
    "truncated": (truncated_picture, ("000000000003.jpg: cannot be decoded as a picture: ", "truncated")),
    "no picture": (lambda root: picture(root).write_bytes(b"<html>404</html>"), ("000000000003.jpg: cannot be decoded",)),
    "32-bit floats": (lambda root: Image.new("F", (4, 4), 0.5).save(picture(root), "tiff"), ("000000000003.jpg: pixel mode F",)),
    "annotation without its image": (set_first("annotations", image_id=77), ("annotations[0].image_id: 77 is not among the images",)),
    "image without annotation": (lambda root: edit(root, lambda c: c["images"].append({"id": 99, "file_name": "000000000003.jpg"})), ("image 99 has no caption",)),
    "id twice": (set_first("images", id=3), ("captions_train2017.json: images[3].id: 3 is listed twice",)),
    "empty caption": (set_first("annotations", caption=" \n"), ("captions_train2017.json: annotations[0].caption of image 0 is empty",)),
    "no examples": (lambda root: edit(root, lambda c: c.update(images=[], annotations=[])), ("captions_train2017.json: images: the list is empty",)),
    "broken JSON": (lambda root: cut_in_half(root / "annotations" / "captions_train2017.json"), ("captions_train2017.json: line ", "broken JSON")),
    "name that climbs out": (set_first("images", file_name="../../secret.jpg"), ("'../../secret.jpg' leads out of ",)),
    "absolute name": (set_first("images", file_name="/etc/passwd"), ("'/etc/passwd' leads out of ",)),
    "link to nothing": (dangling_link, ("'000000000003.jpg' is not in ", "it is a link to ", "gone.jpg")),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_PICTURES)
def test_broken_pictures_stop_before_training(coco: Path, case: str) -> None:
    change, says = BROKEN_PICTURES[case]
    change(coco)
    assert_refused("coco_captions", coco, *says)


def test_a_decompression_bomb_stops_before_it_is_decoded(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_PIXELS", 16 * 12)  # the others have so many
    Image.new("L", (193, 1)).save(picture(coco), "png")
    assert_refused("coco_captions", coco, "000000000003.jpg: 193 × 1 pixels; allowed: 192")


CONVERTED: dict[str, tuple[Image.Image, str, str]] = {
    "grey-scale": (Image.new("L", (8, 8), 90), "jpeg", "grey-scale, read as RGB"),
    "CMYK": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg", "CMYK, read as RGB"),
    "16-bit": (Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)), "png", "16-bit grey-scale, read as 8-bit RGB"),
    "transparent": (Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "png", "transparent, put on white"),
    "palette": (Image.new("P", (8, 8)), "png", "palette of colours, read as RGB"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERTED)
def test_pictures_of_other_kinds_are_read_and_counted(coco: Path, case: str) -> None:
    made, format_, remark = CONVERTED[case]
    made.save(picture(coco), format_)
    assert_read("coco_captions", coco, f"1 file: {remark} ({picture(coco)})")


def test_text_that_is_not_ascii_is_kept(coco: Path) -> None:
    caption = "Ein Mädchen hält 猫 und 🐈‍⬛ in Łódź"
    edit(coco, lambda content: content["annotations"][0].update(caption=caption))
    renamed = picture(coco).with_name("über ウサギ.jpg")
    picture(coco).rename(renamed)
    edit(coco, lambda content: content["images"][3].update(file_name=renamed.name))
    assert_read("coco_captions", coco)
    examples = CocoCaptions(CocoCaptions.Config(root=coco)).examples("train")
    assert examples[0].references[0] == caption
    assert examples[3].files == (("image", renamed),)


def test_a_caption_of_ten_thousand_characters_is_cut_where_the_budget_says(coco: Path) -> None:
    caption = "very " * 1999 + "long."
    edit(coco, lambda content: content["annotations"][0].update(caption=caption))
    assert_read("coco_captions", coco, "longest reference: 10,000 characters, of example '0'")
    batches = build(spec_of("coco_captions", coco), torch.device("cpu")).batches
    example = batches.features.task.examples("train")[0]
    batch = batches.make([example], [example.references[0]])
    assert len(batch.targets.label_N) == 63 + 1  # and EOS
    assert batches.cut_targets == {text_key(caption)}  # the record of the trial warns about them


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("task", "closed", "reason"),
    [
        ("coco_captions", ".", "Permission denied"),
        ("coco_captions", "annotations", "Permission denied"),
        ("coco_captions", "train2017", "Permission denied"),
        ("coco_captions", "train2017/000000000003.jpg", "Permission denied"),
        ("speech", "recordings", "Permission denied"),
        ("speech", "recordings/2_bob_0.wav", "System error"),  # libsndfile's message
    ],
)
def test_a_file_without_permission_stops_before_training(task: str, closed: str, reason: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # other users cannot read pytest's
        root = Path(folder) / "data"
        root.mkdir()
        {"coco_captions": CocoCaptions, "speech": Speech}[task].sample(root)
        spec = spec_of(task, root)
        Path(folder).chmod(0o777)
        (root / closed).chmod(0)
        try:
            with as_nobody():
                fine, text = checked(task, f"root={root}")
                with pytest.raises(UserError, match=re.escape(str(root / closed))) as refusal:
                    check_data([spec], Path(folder), Console(file=io.StringIO()))
        finally:
            (root / closed).chmod(0o755)
    assert not fine
    for message in (text, str(refusal.value)):
        assert str(root / closed) in message
        assert reason in message


def test_a_link_to_itself_stops_before_training(coco: Path) -> None:
    picture(coco).unlink()
    picture(coco).symlink_to(picture(coco).name)
    assert_refused("coco_captions", coco, "000000000003.jpg")


def recording(root: Path) -> Path:
    """One of the training files."""
    return root / "recordings" / "2_bob_0.wav"


def write_sound(
    path: Path, samples: Sequence[Any] | np.ndarray, rate_hz: int = 16_000, subtype: str = "PCM_16"
) -> None:
    soundfile.write(path, np.asarray(samples), rate_hz, subtype=subtype)


def without_two_speakers(root: Path) -> None:
    for path in root.glob("recordings/*_[cd]e[me]_*"):
        path.unlink()


BROKEN_RECORDINGS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "empty file": (lambda root: recording(root).write_bytes(b""), ("2_bob_0.wav: ",)),
    "no recording": (lambda root: recording(root).write_bytes(b"<html>404</html>"), ("2_bob_0.wav: cannot be decoded as audio",)),
    "truncated": (lambda root: cut_in_half(recording(root)), ("2_bob_0.wav: truncated: its header promises",)),
    "header alone": (lambda root: write_sound(recording(root), []), ("2_bob_0.wav: has no samples",)),
    "not a number": (lambda root: write_sound(recording(root), [0.0, np.nan], subtype="FLOAT"), ("2_bob_0.wav: has samples that are NaN or infinite",)),
    "name of another form": (lambda root: recording(root).rename(recording(root).with_name("two.wav")), ("two.wav: the name is not",)),
    "a split without examples": (without_two_speakers, ("recordings: speakers found: ann, bob; at least three are needed",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_RECORDINGS)
def test_broken_recordings_stop_before_training(recordings: Path, case: str) -> None:
    change, says = BROKEN_RECORDINGS[case]
    change(recordings)
    assert_refused("speech", recordings, *says)


@pytest.mark.parametrize(
    ("shape", "rate_hz", "remark"),
    [
        ((800,), 44_100, "44,100 Hz, resampled to 16,000 Hz"),
        ((800, 2), 16_000, "stereo, averaged to mono"),
        ((800, 6), 48_000, "6 channels, averaged to mono; 48,000 Hz, resampled to 16,000 Hz"),
    ],
)
def test_recordings_of_other_kinds_are_read_and_counted(
    recordings: Path, shape: tuple[int, ...], rate_hz: int, remark: str
) -> None:
    write_sound(recording(recordings), np.zeros(shape), rate_hz)
    assert_read("speech", recordings, f"1 file: {remark} ({recording(recordings)})", "15 files: 8,000 Hz, resampled")


def test_an_input_that_the_encoder_rejects_stops_an_experiment(recordings: Path) -> None:
    write_sound(recording(recordings), np.zeros(31_000), 1000)
    assert checked("speech", f"root={recordings}")[0]  # a task alone names no encoder
    refusal = f"{recording(recordings)}: 31.0 s long; builtin/tiny-audio takes at most 30 s"
    with pytest.raises(UserError, match=re.escape(refusal)):
        preflight("speech", recordings)
    fine, text = checked(recordings.parent / "experiment.yaml")
    assert not fine
    assert refusal in text


# The second row of train/metadata.csv, and parts of the messages.
BROKEN_TRANSCRIPTS = {
    "recording that is missing": (b"c.wav,two", "train/metadata.csv: line 3: file_name: 'c.wav' is not in"),
    "recording that is listed twice": (
        b"a.wav,two",
        "train/metadata.csv: line 3: file_name: 'a.wav' is already listed",
    ),
    "empty transcript": (b'b.wav," "', "train/metadata.csv: line 3: transcription: found ' '"),
    "name that climbs out": (
        b"../../secret.wav,two",
        "train/metadata.csv: line 3: file_name: '../../secret.wav' leads out of",
    ),
    "other encoding": (b"b.wav,t\xe9l\xe9", "train/metadata.csv: line 3: not UTF-8"),
}


@pytest.fixture
def transcribed(tmp_path: Path) -> Path:
    """Two recordings and their transcripts in each split."""
    root = tmp_path / "transcribed"
    for number, split in enumerate(("train", "validation", "test")):
        (root / split).mkdir(parents=True)
        for name, level in (("a", 0.1), ("b", 0.2)):
            write_sound(root / split / f"{name}.wav", np.full(800, level + number))
        (root / split / "metadata.csv").write_text("file_name,transcription\na.wav,Ein Mädchen hält 猫\nb.wav,two\n")
    return root


@pytest.mark.parametrize("case", BROKEN_TRANSCRIPTS)
def test_broken_transcripts_stop_before_training(transcribed: Path, case: str) -> None:
    row, says = BROKEN_TRANSCRIPTS[case]
    (transcribed / "train" / "metadata.csv").write_bytes(b"file_name,transcription\na.wav,one\n" + row + b"\n")
    assert_refused("speech", transcribed, says)


def test_transcripts_that_are_not_ascii_are_kept(transcribed: Path) -> None:
    assert_read("speech", transcribed)
    assert Speech(Speech.Config(root=transcribed)).examples("test")[0].references == ("Ein Mädchen hält 猫",)
