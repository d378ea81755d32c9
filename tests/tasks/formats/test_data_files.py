"""Folders and files of data sets: errors name the nearest files, no annotation leads out of its folder, links are
followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.errors import UserError
from tasks.formats.data_files import DataFiles, MissingFileError, leaves_folder, require_file, require_folder


def test_a_missing_folder_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "train-clean-100").mkdir()
    with pytest.raises(
        UserError, match=r"84: the folder of speech does not exist; in .*did you mean 'train-clean-100'\?"
    ):
        require_folder(tmp_path / "train-claen-100" / "84", "speech")
    require_folder(tmp_path / "train-clean-100", "speech")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: the folder of speech is a file; allowed: a folder"):
        require_folder(tmp_path / "file", "speech")


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    for name in ("train.json", "train.txt", *(f"x{number}.json" for number in range(20))):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"trian\.json: the list does not exist; .*did you mean 'train.json'\?") as told:
        require_file(tmp_path / "trian.json", "list")
    assert "train.txt" not in str(told.value)
    assert str(told.value).count(".json") == 1 + 10 + 1  # of a large folder only the ten nearest names
    with pytest.raises(UserError, match=r"nowhere/train\.json: the list does not exist; in .* allowed: nothing"):
        require_file(tmp_path / "nowhere" / "train.json", "list")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json: the list is a folder; allowed: a file"):
        require_file(tmp_path / "folder.json", "list")
    require_file(tmp_path / "train.json", "list")


@pytest.mark.parametrize(
    ("name", "leaves"),
    [("a.jpg", False), ("a/b.jpg", False), ("..jpg", False), ("../a", True), ("a/../../b", True), ("/etc", True)],
)
def test_which_names_leave_their_folder(name: str, leaves: bool) -> None:
    assert leaves_folder(name) == leaves


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.wav", r"line 1: 'gone\.wav' is not in"),
        ("", r"line 1: '' is not in"),
        (".", r"line 1: '\.' is not in"),
        ("zero\x00.wav", r"'zero\\x00\.wav' is not in"),
        ("../secret.wav", r"line 1: '\.\./secret\.wav' leads out of .*root; allowed: files inside it"),
        ("../root/a.wav", r"leads out of"),
        ("/etc/passwd", r"line 1: '/etc/passwd' leads out of"),
        ("dangling.wav", r"line 1: 'dangling\.wav' is not in .*root; it is a link to gone"),
        ("folder/../secret.wav", r"line 1: 'folder/\.\./secret\.wav' leads out of"),
        ("loop.wav", r"line 1: 'loop\.wav' (in .*root cannot be read: Symlink loop|is not in)"),
        ("n" * 300, r"line 1: 'n{80}' in .*root cannot be read: File name too long"),
    ],
)
def test_names_that_are_rejected(tmp_path: Path, name: str, message: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.wav").touch()
    (root / "a.wav").touch()
    (root / "dangling.wav").symlink_to("gone")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop.wav").symlink_to(root / "loop.wav")
    with pytest.raises(UserError, match=message) as raised:
        DataFiles().find(root, name, "line 1")
    assert isinstance(raised.value, MissingFileError) == ("is not in" in str(raised.value))


def test_links_are_followed_wherever_they_lead(tmp_path: Path) -> None:
    root, disk = tmp_path / "root", tmp_path / "disk"
    (disk / "sub").mkdir(parents=True)
    (root / "other").mkdir(parents=True)
    for path in (disk / "a.jpg", disk / "sub" / "b.jpg", root / "other" / "c.jpg"):
        path.touch()
    (root / "train").symlink_to(disk)  # the user's own: images on another disk
    (disk / "c.jpg").symlink_to(root / "other" / "c.jpg")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "4f2a").touch()
    (disk / "d.jpg").symlink_to(tmp_path / "blobs" / "4f2a")  # as in the hub's cache
    files = DataFiles()
    for name in ("a.jpg", "sub/b.jpg", "c.jpg", "d.jpg"):
        assert files.find(root / "train", name, "") == root / "train" / name
    assert files.real(root / "train" / "c.jpg") == (root / "other" / "c.jpg").resolve()
