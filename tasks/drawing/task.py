"""Tasks whose data are drawn by code into the cache: any number of examples, without a download.

Example ``i`` of a split depends on (data_seed, split, i) alone, so a larger set begins with the smaller one.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from harness.core.errors import UserError
from harness.core.files import cache_folder
from tasks.base import Config, Split, Task
from tasks.cache_folder import write_once

# Ids start here, so that they are unique over the task however many examples a split has.
FIRST_ID: dict[Split, int] = {"train": 10_000_000, "validation": 20_000_000, "test": 30_000_000}
_MAX_EXAMPLES = 10_000_000


class DrawnConfig(Config):
    """How many examples of each split, and the seed that determines them."""

    train_examples: int = Field(default=2048, ge=1, le=_MAX_EXAMPLES)
    validation_examples: int = Field(default=512, ge=1, le=_MAX_EXAMPLES)
    test_examples: int = Field(default=512, ge=1, le=_MAX_EXAMPLES)
    data_seed: int = 0


class DrawnTask(Task):
    """A task that draws its data below ``$HARNESS_CACHE``, once for all processes of this machine."""

    folder_name: ClassVar[str]  # in the cache
    Config = DrawnConfig
    config: DrawnConfig

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """Sixteen examples; they are drawn into the cache by ``prepare``, so the folder stays empty."""
        return {"train_examples": 8, "validation_examples": 4, "test_examples": 4}

    @cached_property
    def folder(self) -> Path:
        """Where this configuration's data are. A change in what is drawn needs another ``result_version``."""
        key = f"{self.config.model_dump_json()} {self.result_version}"
        return cache_folder(self.folder_name, hashlib.sha256(key.encode()).hexdigest()[:16])

    def prepare(self) -> None:
        """Draw the data, once.

        Raises:
            UserError: the cache folder cannot be written to.
        """
        try:
            write_once(self.folder, self._write)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write the data of the task {self.folder_name}: {error}") from error

    def _write(self, folder: Path) -> None:
        for split in FIRST_ID:
            (folder / split).mkdir()
            self.write_split(folder, split, getattr(self.config, f"{split}_examples"))

    @abstractmethod
    def write_split(self, folder: Path, split: Split, count: int) -> None:
        """Draw a split into ``folder / split``, which is empty, and list it in ``folder``."""
