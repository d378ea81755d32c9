"""Visual question answering: VQAv2, https://visualqa.org/download.html, and GQA, https://gqadataset.org.

root/train2014/COCO_train2014_000000458752.jpg
root/v2_OpenEnded_mscoco_train2014_questions.json:
    {"questions": [{"image_id": 458752, "question": "What is this photo taken looking through?",
                    "question_id": 458752000}, ...]}
root/v2_mscoco_train2014_annotations.json:
    {"annotations": [{"question_id": 458752000, "image_id": 458752, "multiple_choice_answer": "net",
                      "answers": [{"answer": "net", "answer_confidence": "maybe", "answer_id": 1}, ...]}, ...]}

root/images/2354786.jpg
root/train_balanced_questions.json:
    {"02930152": {"imageId": "2354786", "question": "Is the sky dark?", "answer": "yes",
                  "fullAnswer": "Yes, the sky is dark.", ...}, ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from harness.core.errors import ProblemList
from harness.core.paths import ExperimentPath
from tasks.base import Config, Example, Part, Split
from tasks.formats.data_files import require_folder
from tasks.formats.vqa import FORMATS, Question, detect, files_of
from tasks.splits import FileTask, check_disjoint, in_test_half

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # part of a file name: cannot lead out of the root


class VQAConfig(Config):
    """Where questions and images are, and how a question is presented."""

    root: ExperimentPath  # the folder that holds the question files and the image folders
    format: Literal["vqav2", "gqa"] | None = None  # none: detected from the question files
    train: _Name | None = None  # none: train2014 of VQAv2, train_balanced of GQA
    validation: _Name | None = None  # none: val2014, val_balanced
    test: _Name | None = None  # none: half of the validation images, chosen by a hash of their ids
    question_template: str = "{question}\n"  # the text of the question; the answer follows unchanged, without a space

    @field_validator("question_template")
    @classmethod
    def _has_the_question_once(cls, value: str) -> str:
        if value.count("{question}") != 1:
            raise ValueError(f"must contain {{question}} exactly once; found {value!r}")
        return value


class VQA(FileTask):
    """Answer a question about a picture. The answers of all people are references: the metric counts how many agree."""

    contexts = ("image", "question", "answer")
    modalities: Mapping[str, str] = {"image": "image"}
    metrics = ("vqa_accuracy", "exact_match")
    Config = VQAConfig
    config: VQAConfig

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """Plain pictures in VQAv2's layout, with questions about their colour."""
        _write_vqav2(folder, "train2014", range(1, 5), questions=2)
        _write_vqav2(folder, "val2014", range(15, 23), questions=1)
        return {"root": str(folder)}

    def annotation_files(self) -> list[Path]:
        """The questions and annotations of every split."""
        form = FORMATS[self.config.format or detect(self.root)]
        names = [self.config.train or form.train, self.config.validation or form.validation, self.config.test]
        return [path for name in names if name is not None for path in files_of(self.root, form, name)]

    def read_splits(self, problems: ProblemList) -> dict[Split, tuple[Example, ...]]:
        """The questions of a split in the order of its file."""
        root = self.root
        require_folder(root, "questions and images")
        form = FORMATS[self.config.format or detect(root)]
        train = form.read(root, self.config.train or form.train, problems)
        validation = form.read(root, self.config.validation or form.validation, problems)
        if self.config.test is None:
            test = [question for question in validation if in_test_half(question.image_id)]
            validation = [question for question in validation if not in_test_half(question.image_id)]
        else:
            test = form.read(root, self.config.test, problems)
        splits: dict[Split, list[Question]] = {"train": train, "validation": validation, "test": test}
        images = {split: [question.image_id for question in questions] for split, questions in splits.items()}
        check_disjoint(root, "image", images, problems)
        return {split: tuple(map(self._example, questions)) for split, questions in splits.items()}

    def _example(self, question: Question) -> Example:
        text = self.config.question_template.replace("{question}", question.text)
        parts = (Part("image", question.image), Part("question", text))
        return Example(question.id, parts, question.answers, cluster=question.image_id)


def _write_vqav2(root: Path, name: str, image_ids: Sequence[int], questions: int) -> None:
    from PIL import Image

    (root / name).mkdir()
    asked, annotations = [], []
    for image_id in image_ids:
        colour = ("red", "green", "blue")[image_id % 3]
        Image.new("RGB", (8, 8), colour).save(root / name / f"COCO_{name}_{image_id:012d}.jpg")
        for number in range(questions):
            key = {"image_id": image_id, "question_id": 1000 * image_id + number}
            asked.append({**key, "question": ("What color is this?", "Is this red?")[number]})
            usual, rare = ((colour, f"dark {colour}"), ("yes" if colour == "red" else "no", "maybe"))[number]
            answers = [
                {"answer": rare if n == 10 else usual, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)
            ]
            kind = {"question_type": "what color", "answer_type": "other", "multiple_choice_answer": usual}
            annotations.append({**key, **kind, "answers": answers})
    for form, content in (
        ("v2_OpenEnded_mscoco_{}_questions", {"questions": asked}),
        ("v2_mscoco_{}_annotations", {"annotations": annotations}),
    ):
        (root / f"{form.format(name)}.json").write_text(json.dumps(content), encoding="utf-8")
