"""The VQA reader: the layouts of VQAv2 and GQA, and both with all common errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PilImage
from pydantic import ValidationError

from harness.core.errors import Problems, UserError
from tasks.base import Part
from tasks.modalities.image import Image
from tasks.vqa import VQA

QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    VQA.sample(tmp_path)
    return tmp_path


def vqa(root: Path, **options: Any) -> VQA:
    return VQA(VQA.Config(root=root, **options))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_gqa(root: Path, name: str, images: range, **changes: Any) -> Path:
    (root / "images").mkdir(exist_ok=True)
    questions = {}
    for number in images:
        PilImage.new("RGB", (4, 4), "red").save(root / "images" / f"{number}.jpg")
        for n in range(2):
            questions[f"{number:07d}{n}"] = {
                "semantic": [{"operation": "select", "argument": "sky (1)", "dependencies": []}],
                "imageId": str(number),
                "question": f"Is the sky dark {n}?",
                "answer": "yes",
                "fullAnswer": "Yes, the sky is dark.",
            }
    questions[next(iter(questions))].update(changes)
    path = root / f"{name}_questions.json"
    path.write_text(json.dumps(questions), encoding="utf-8")
    return path


def test_a_vqav2_example_keeps_all_answers(root: Path) -> None:
    example = vqa(root).examples("train")[0]
    assert example.id == "1000"
    assert example.inputs == (
        Part("image", root / "train2014" / "COCO_train2014_000000000001.jpg"),
        Part("question", "What color is this?\n"),
    )
    assert example.references == ("green",) * 9 + ("dark green",)
    assert example.target is None  # the last context: the answer
    assert Image().load(example.files[0][1]).size == (8, 8)


def test_gqa_is_told_by_its_files(tmp_path: Path) -> None:
    write_gqa(tmp_path, "train_balanced", range(1, 4))
    write_gqa(tmp_path, "val_balanced", range(10, 30))
    task = vqa(tmp_path)
    task.prepare()
    assert [example.id for example in task.examples("train")][:2] == ["00000010", "00000011"]
    example = task.examples("train")[0]
    assert example.inputs[0].value == tmp_path / "images" / "1.jpg"
    assert example.references == ("yes",)
    write_gqa(tmp_path, "testdev_balanced", range(40, 42))
    assert len(vqa(tmp_path, test="testdev_balanced").examples("test")) == 4
    assert len(vqa(tmp_path, test="testdev_balanced").examples("validation")) == 40


def test_validation_is_halved_by_image(tmp_path: Path) -> None:
    write_gqa(tmp_path, "train_balanced", range(1, 3))
    write_gqa(tmp_path, "val_balanced", range(10, 60))
    task = vqa(tmp_path)
    files = [{example.files[0][1] for example in task.examples(split)} for split in ("validation", "test")]
    assert files[0].isdisjoint(files[1])
    assert len(files[0] | files[1]) == 50
    assert min(map(len, files)) > 15
    assert [len(task.examples(split)) for split in ("validation", "test")] == [2 * len(part) for part in files]


def test_the_template_says_how_a_question_is_put(root: Path) -> None:
    task = vqa(root, question_template="Q: {question} {0}\nA:")
    assert task.examples("train")[0].inputs[1].value == "Q: What color is this? {0}\nA:"
    for template in ("Q:", "{question}{question}"):
        with pytest.raises(ValidationError, match=r"must contain \{question\} exactly once"):
            vqa(root, question_template=template)


def test_white_space_is_collapsed_and_other_text_is_as_it_was(root: Path) -> None:
    def change(content: Any) -> None:
        content["questions"][0]["question"] = " Où est\n le café ? "
        content["questions"][1]["question"] = "why " * 2500

    edit(root / QUESTIONS.format("train2014"), change)
    first, second, *_ = vqa(root).examples("train")
    assert first.inputs[1].value == "Où est le café ?\n"
    assert second.inputs[1].value == ("why " * 2500).strip() + "\n"


def test_a_byte_order_mark_is_taken(root: Path) -> None:
    path = root / QUESTIONS.format("train2014")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(vqa(root).examples("train")) == 8


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            QUESTIONS,
            lambda c: c["questions"].append(c["questions"][0]),
            r"questions\[8\]\.question_id: 1000 is listed twice",
        ),
        (
            ANNOTATIONS,
            lambda c: c["annotations"].append(c["annotations"][0]),
            r"annotations\[8\]\.question_id: 1000 is ",
        ),
        (QUESTIONS, lambda c: c["questions"].pop(), r"the annotation of question 4001 has no question in v2_OpenEnded"),
        (ANNOTATIONS, lambda c: c["annotations"].pop(), r"question 4001 has no annotation in v2_mscoco_train2014"),
        (QUESTIONS, lambda c: c["questions"].clear(), r"questions: the list is empty"),
        (QUESTIONS, lambda c: c["questions"][2].update(question=" "), r"question 2000 is empty"),
        (
            QUESTIONS,
            lambda c: c["questions"][2].update(image_id=77),
            r"question 2000 is about image 77, but .* image 2",
        ),
        (QUESTIONS, lambda c: c["questions"][2].pop("image_id"), r"questions\.2\.image_id: .*required"),
        (
            QUESTIONS,
            lambda c: c["questions"][2].update(question=5),
            r"questions\.2\.question: .*valid string; found '5'",
        ),
        (QUESTIONS, lambda c: c.pop("questions"), r"train2014_questions\.json: questions: .*required"),
        (ANNOTATIONS, lambda c: c["annotations"][2].update(answers=[]), r"question 2000 has no answers"),
        (
            ANNOTATIONS,
            lambda c: [c["annotations"][2]["answers"][n].update(answer=" \n") for n in (0, 4)],
            r"question 2000: answers\[0, 4\]: empty; remove them or the question",
        ),
        (
            ANNOTATIONS,
            lambda c: c["annotations"][2]["answers"][3].update(answer=None),
            r"annotations\.2\.answers\.3\.answer: .*valid string; found 'None'",
        ),
    ],
)
def test_wrong_vqav2_files_are_refused_with_the_place(
    root: Path, name: str, change: Callable[[Any], Any], message: str
) -> None:
    edit(root / name.format("train2014"), change)
    with pytest.raises(UserError, match=message):
        vqa(root).prepare()


def test_all_problems_of_all_splits_come_at_once(root: Path) -> None:
    (root / "train2014" / "COCO_train2014_000000000003.jpg").unlink()
    edit(root / ANNOTATIONS.format("val2014"), lambda content: content["annotations"].pop(0))
    with pytest.raises(Problems, match="2 problems:") as caught:
        vqa(root).prepare()
    missing, lonely = caught.value.messages
    assert missing.endswith(f"question 3000: image: 'COCO_train2014_000000000003.jpg' is not in {root / 'train2014'}")
    assert lonely.endswith("question 15000 has no annotation in v2_mscoco_val2014_annotations.json")


def test_broken_json_is_shown_with_its_place(root: Path) -> None:
    path = root / QUESTIONS.format("train2014")
    path.write_text('{"questions": [\n {"image_id": 4 "question": "x"}\n]}')
    with pytest.raises(UserError, match=r"questions\.json: line 2, column 17: broken JSON, .*: '.*4 \"question\""):
        vqa(root).prepare()
    path.write_bytes(b'{"questions": "\xff"}')
    with pytest.raises(UserError, match=r"line 1: not UTF-8 \(byte 0xff\)"):
        vqa(root).prepare()
    path.write_text('{"questions": [{"image_id": 1, "question_id": 1, "question": "\\ud800"}]}')
    with pytest.raises(UserError, match=r"line 1, column \d+: half of a surrogate pair"):
        vqa(root).prepare()


def test_missing_files_and_folders_name_what_is_there(root: Path) -> None:
    with pytest.raises(
        UserError, match=r"train2041_questions\.json: .*did you mean 'v2_OpenEnded_mscoco_train2014_quest"
    ):
        vqa(root, train="train2041").prepare()
    (root / "val2014").rename(root / "val_2014")
    with pytest.raises(UserError, match=r"val2014: the folder of images does not exist; .*did you mean 'val_2014'\?"):
        vqa(root).prepare()
    with pytest.raises(UserError, match=r"nowhere: the folder of questions and images does not exist"):
        vqa(root / "nowhere").prepare()
    with pytest.raises(UserError, match=r"questions\.json: the folder of questions and images is a file"):
        vqa(root / QUESTIONS.format("train2014")).prepare()
    with pytest.raises(
        UserError, match=r"val_2014: neither of v2_OpenEnded_.*, train_balanced.*`format: vqav2 \| gqa`"
    ):
        vqa(root / "val_2014").prepare()


def test_two_data_sets_in_one_folder_need_the_format(root: Path) -> None:
    write_gqa(root, "train_balanced", range(1, 3))
    write_gqa(root, "val_balanced", range(10, 30))
    with pytest.raises(UserError, match=r"questions of vqav2 and gqa; .*`format: vqav2 \| gqa`"):
        vqa(root).prepare()
    assert vqa(root, format="vqav2").examples("train")[0].id == "1000"
    assert vqa(root, format="gqa").examples("train")[0].id == "00000010"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imageId": "../../secret"}, r"question 00000010: image: '\.\./\.\./secret\.jpg' leads out of .*images"),
        ({"imageId": "99"}, r"question 00000010: image: '99\.jpg' is not in .*images"),
        ({"imageId": 5}, r"00000010\.imageId: .*valid string; found '5'"),
        ({"answer": None}, r"question 00000010 has no answer; GQA gives those of train, val and testdev only"),
        ({"answer": ""}, r"question 00000010: answers\[0\]: empty"),
    ],
)
def test_wrong_gqa_files_are_refused_with_the_question(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_gqa(tmp_path, "train_balanced", range(1, 3), **changes)
    write_gqa(tmp_path, "val_balanced", range(10, 30))
    with pytest.raises(UserError, match=message):
        vqa(tmp_path).prepare()


def test_splits_may_not_share_images_or_be_empty(tmp_path: Path) -> None:
    write_gqa(tmp_path, "train_balanced", range(1, 5))
    write_gqa(tmp_path, "val_balanced", range(4, 30))
    with pytest.raises(UserError, match=r"image 4 is in train and in test; splits may not overlap"):
        vqa(tmp_path).prepare()
    write_gqa(tmp_path, "val_balanced", range(10, 11))
    with pytest.raises(UserError, match=r"no examples for (validation|test)"):
        vqa(tmp_path).prepare()
    (tmp_path / "val_balanced_questions.json").write_text("{}")
    with pytest.raises(UserError, match=r"val_balanced_questions\.json: no questions"):
        vqa(tmp_path).prepare()


@pytest.mark.parametrize("name", ["../train2014", "a/b", ""])
def test_names_of_splits_cannot_lead_out_of_the_root(root: Path, name: str) -> None:
    with pytest.raises(ValidationError, match="should match pattern"):
        vqa(root, train=name)
