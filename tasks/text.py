"""Conversations and instructions as JSON Lines, one example per line, in the three forms of Hugging Face's TRL
(https://huggingface.co/docs/trl/dataset_formats):

    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What color is the sky?"},
                  {"role": "assistant", "content": "It is blue."}]}
    {"instruction": "Translate into French.", "input": "The sky is blue.", "output": "Le ciel est bleu."}
    {"prompt": "The sky is", "completion": " blue."}

The last answer is the target. The second form is Alpaca's, https://github.com/tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import field_validator

from harness.core.errors import ProblemList
from harness.core.paths import ExperimentPath
from tasks.base import Config, Example, Part, Split
from tasks.formats.conversations import Conversation, clusters, read_lines
from tasks.formats.data_files import leaves_folder, nearest, require_folder
from tasks.splits import FileTask, check_disjoint


class TextConfig(Config):
    """Where the lines are, and the template of each turn."""

    root: ExperimentPath  # the folder of the files
    train: str = "train.jsonl"  # a file below the root, or several by a pattern: "train-*.jsonl", "**/train.jsonl"
    validation: str | None = None  # none: a tenth of the training lines, by a hash of the turns before the answer
    test: str | None = None  # none: half of the validation lines, by the same hash
    # How a turn before the answer is presented to the model. The answer itself has no template.
    system_template: str = "{content}\n"
    user_template: str = "{content}\n"
    assistant_template: str = "{content}\n"  # of earlier answers

    @field_validator("train", "validation", "test")
    @classmethod
    def _stays_in_root(cls, value: str | None) -> str | None:
        if value is not None and (not value or leaves_folder(value)):
            raise ValueError(f"must be the name or the pattern of files inside the root; found {value!r}")
        return value

    @field_validator("system_template", "user_template", "assistant_template")
    @classmethod
    def _has_the_content_once(cls, value: str) -> str:
        if value.count("{content}") != 1:
            raise ValueError(f"must contain {{content}} exactly once; found {value!r}")
        return value


class Text(FileTask):
    """Follow an instruction, or answer in a conversation. A context is a role; it occurs in every turn of that role."""

    contexts = ("system", "user", "assistant")
    modalities: Mapping[str, str] = {}
    metrics = ("exact_match", "rouge")
    Config = TextConfig
    config: TextConfig

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """Sums, in each of the three forms; one file per split."""
        for name, numbers in (("train", range(9)), ("validation", range(9, 13)), ("test", range(13, 17))):
            lines = [json.dumps(_sum(number)) for number in numbers]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"root": str(folder), "validation": "validation.jsonl", "test": "test.jsonl"}

    def annotation_files(self) -> list[Path]:
        """The files of every split."""
        names = filter(None, (self.config.train, self.config.validation, self.config.test))
        return [path for name in names for path in _find(self.root, name, ProblemList())]

    def read_splits(self, problems: ProblemList) -> dict[Split, tuple[Example, ...]]:
        """The lines of a split, in the order of the file names and of the lines."""
        root = self.root
        require_folder(root, "conversations")
        names: dict[Split, str | None] = {
            "train": self.config.train,
            "validation": self.config.validation,
            "test": self.config.test,
        }
        files = {split: _find(root, name, problems) for split, name in names.items() if name is not None}
        check_disjoint(root, "the file", files, problems)
        lines: dict[Split, list[Conversation]] = {
            split: [line for path in paths for line in read_lines(path, path.relative_to(root).as_posix(), problems)]
            for split, paths in files.items()
        }
        if problems.messages:
            return {}
        if "validation" not in lines:
            lines["validation"] = [line for line in lines["train"] if _hash(line)[0] % 10 == 0]
            lines["train"] = [line for line in lines["train"] if _hash(line)[0] % 10 != 0]
        if "test" not in lines:
            lines["test"] = [line for line in lines["validation"] if _hash(line)[1] % 2 == 1]
            lines["validation"] = [line for line in lines["validation"] if _hash(line)[1] % 2 == 0]
        return {split: tuple(map(self._example, lines[split], clusters(lines[split]))) for split in names}

    def _example(self, line: Conversation, cluster: str) -> Example:
        templates = {
            "system": self.config.system_template,
            "user": self.config.user_template,
            "assistant": self.config.assistant_template,
        }
        parts = (
            Part(role, text if line.verbatim else templates[role].replace("{content}", text))
            for role, text in line.turns
        )
        return Example(line.id, tuple(parts), line.references, cluster=cluster)


def _hash(line: Conversation) -> bytes:
    """Hash of the turns before the answer, so that a repeated question is never in two splits."""
    return hashlib.sha256(json.dumps(line.turns).encode()).digest()


def _find(root: Path, name: str, problems: ProblemList) -> list[Path]:
    """The files of a split, sorted by name."""
    try:
        found = sorted(path for path in root.glob(name) if path.is_file())
    except (OSError, ValueError) as error:
        problems.add(f"{root}: {name!r} is not a valid pattern: {error}")
        return []
    if not found:
        present = [path.relative_to(root).as_posix() for path in root.rglob("*.json*")]
        problems.add(f"{root}: {name!r}: no file has this name or pattern; {nearest(name, present)}")
    return found


def _sum(number: int) -> dict[str, Any]:
    a, b = divmod(number, 7)
    answer = str(a + b)
    if number % 3 == 0:
        return {"instruction": "Add the numbers.", "input": f"{a} {b}", "output": answer}
    if number % 3 == 1:
        return {"prompt": f"{a} + {b} =", "completion": f" {answer}"}
    turns = [("system", "You can add."), ("user", "1 + 1?"), ("assistant", "2"), ("user", f"{a} + {b}?")]
    messages = [{"role": role, "content": text} for role, text in (*turns, ("assistant", answer))]
    return {"messages": messages[number % 2 :]}  # every other one without the system message
