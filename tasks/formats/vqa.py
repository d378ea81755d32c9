"""The files of the visual question answering data sets: VQAv2 (https://visualqa.org) and GQA (https://gqadataset.org).

Parsed without the fields that are not needed: VQAv2's training annotations alone are 4.4 million answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from harness.core.errors import ProblemList, UserError
from tasks.formats.data_files import DataFiles, or_compressed, require_file, require_folder
from tasks.formats.json_file import parse_json


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image; ``answers`` are those of all people, repeats included."""

    id: str
    image_id: str
    image: Path
    text: str
    answers: tuple[str, ...]


class Format(NamedTuple):
    """One data set's layout: ``read`` finds the split called NAME below the root."""

    question_file: str  # with {name} for NAME
    other_files: tuple[str, ...]
    train: str  # the official names
    validation: str
    read: Callable[[Path, str, ProblemList], list[Question]]


@dataclass(slots=True)
class _Answer:
    answer: str


@dataclass(slots=True)
class _Annotation:
    question_id: int | str
    image_id: int
    answers: list[_Answer]


@dataclass(slots=True)
class _AnnotationFile:
    annotations: list[_Annotation]


@dataclass(slots=True)
class _Asked:
    question_id: int | str
    image_id: int
    question: str


@dataclass(slots=True)
class _QuestionFile:
    questions: list[_Asked]


@dataclass(slots=True)
class _GqaQuestion:
    imageId: str  # GQA's own name
    question: str
    answer: str | None = None


_Parsed = TypeVar("_Parsed")

_QUESTIONS, _ANNOTATIONS = "v2_OpenEnded_mscoco_{name}_questions.json", "v2_mscoco_{name}_annotations.json"
_GQA = "{name}_questions.json"


def read_vqav2(root: Path, name: str, problems: ProblemList) -> list[Question]:
    """Read VQAv2's two files; the image 458752 of ``train2014`` is ``train2014/COCO_train2014_000000458752.jpg``.

    Returns:
        What could be read, in the order of the question file; everything else is added to the problems.
    """
    path = or_compressed(root / _QUESTIONS.format(name=name))
    answers_path = or_compressed(root / _ANNOTATIONS.format(name=name))
    asked = _parse(path, _QuestionFile, problems)
    annotated = _parse(answers_path, _AnnotationFile, problems)
    if asked is None or annotated is None:
        return []
    annotations = _by_id(answers_path, "annotations", annotated.annotations, problems)
    found: list[Question] = []
    images = _Images(root, root / name, path, problems)
    for key, question in _by_id(path, "questions", asked.questions, problems).items():
        where = f"{path}: question {key}"
        annotation = annotations.pop(key, None)
        if annotation is None:
            problems.add(f"{where} has no annotation in {answers_path.name}")
            continue
        if annotation.image_id != question.image_id:
            problems.add(
                f"{where} is about image {question.image_id}, but {answers_path.name} has image {annotation.image_id}"
            )
        image = images.find(f"COCO_{name}_{question.image_id:012d}.jpg", key)
        answers = [answer.answer for answer in annotation.answers]
        found.append(_question(where, key, str(question.image_id), image, question.question, answers, problems))
    for key in annotations:
        problems.add(f"{answers_path}: the annotation of question {key} has no question in {path.name}")
    return found


def read_gqa(root: Path, name: str, problems: ProblemList) -> list[Question]:
    """Read one of GQA's question files that are a single file (``train_balanced``, …); all images are in ``images``.

    Returns:
        What could be read, in the order of the file; everything else is added to the problems.
    """
    path = or_compressed(root / _GQA.format(name=name))
    questions = _parse(path, dict[str, _GqaQuestion], problems)
    if questions is None:
        return []
    if not questions:
        problems.add(f"{path}: no questions; at least one is needed")
    images = _Images(root, root / "images", path, problems)
    found: list[Question] = []
    for key, question in questions.items():
        where = f"{path}: question {key}"
        if question.answer is None:
            problems.add(f"{where} has no answer; GQA gives those of train, val and testdev only")
            continue
        image = images.find(f"{question.imageId}.jpg", key)
        found.append(_question(where, key, question.imageId, image, question.question, [question.answer], problems))
    return found


FORMATS: Mapping[str, Format] = {
    "vqav2": Format(_QUESTIONS, (_ANNOTATIONS,), "train2014", "val2014", read_vqav2),
    "gqa": Format(_GQA, (), "train_balanced", "val_balanced", read_gqa),
}


def files_of(root: Path, form: Format, name: str) -> list[Path]:
    """The files that a split is read from."""
    return [or_compressed(root / pattern.format(name=name)) for pattern in (form.question_file, *form.other_files)]


def detect(root: Path) -> str:
    """The format whose official training or validation questions are in the folder.

    Raises:
        UserError: it holds the questions of none or of several formats.
    """
    present = {entry.name.removesuffix(".gz") for entry in root.iterdir()}
    found = [
        key
        for key, form in FORMATS.items()
        if present & {form.question_file.format(name=name) for name in (form.train, form.validation)}
    ]
    if len(found) == 1:
        return found[0]
    wanted = ", ".join(form.question_file.format(name=form.train) for form in FORMATS.values())
    what = f"questions of {' and '.join(found)}" if found else f"neither of {wanted}"
    raise UserError(f"{root}: {what}; set the data set: `format: {' | '.join(FORMATS)}`")


class _Images:
    """The images of one split; a missing one is reported once, with the first question about it."""

    def __init__(self, root: Path, folder: Path, questions: Path, problems: ProblemList) -> None:
        self.folder, self.questions, self.problems = folder, questions, problems
        self._files = DataFiles()
        self._found: dict[str, Path] = {}  # one path for all questions on an image
        self._reachable = True
        try:
            require_folder(folder, "images")
        except UserError as error:
            problems.add(error)
            self._reachable = False

    def find(self, name: str, question: str) -> Path:
        """The path of an image; whatever is wrong with it is added to the problems."""
        if name not in self._found:
            self._found[name] = self.folder / name
            try:
                if self._reachable:
                    self._files.find(self.folder, name, f"{self.questions}: question {question}: image")
            except UserError as error:
                self.problems.add(error)
        return self._found[name]


def _by_id(path: Path, key: str, items: Iterable[Any], problems: ProblemList) -> dict[str, Any]:
    """Items by question id; a repeated id is a problem, and so is an empty list."""
    found: dict[str, Any] = {}
    for number, item in enumerate(items):
        question_id = str(item.question_id)
        if question_id in found:
            problems.add(f"{path}: {key}[{number}].question_id: {question_id} is listed twice; ids are unique")
        found.setdefault(question_id, item)
    if not found:
        problems.add(f"{path}: {key}: the list is empty; at least one is needed")
    return found


def _question(
    where: str, key: str, image_id: str, image: Path, text: str, answers: list[str], problems: ProblemList
) -> Question:
    """Collapse white space (a stray line break is not part of an answer) and report what is empty."""
    text = " ".join(text.split())
    cleaned = tuple(" ".join(answer.split()) for answer in answers)
    if not text:
        problems.add(f"{where} is empty")
    if not cleaned:
        problems.add(f"{where} has no answers")
    if empty := [str(number) for number, answer in enumerate(cleaned) if not answer]:
        problems.add(f"{where}: answers[{', '.join(empty)}]: empty; remove them or the question")
    return Question(key, image_id, image, text, cleaned)


def _parse(path: Path, content: type[_Parsed], problems: ProblemList) -> _Parsed | None:
    """Parse a JSON file; whatever is wrong with it is added to the problems."""
    try:
        require_file(path, "file")
        return parse_json(path, content)
    except UserError as error:
        problems.add(error)
        return None
