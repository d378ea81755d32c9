"""What is asserted of an experiment file that is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.experiment.load import Experiment


def check_refused(path: Path, line: int, key: str, says: str) -> None:
    """The file is refused, and the message begins with its path, the line and the key, and says why."""
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        Experiment.from_yaml(path)
    assert str(caught.value).startswith(f"{path}, line {line}, {key}: "), str(caught.value)
