"""The names of axes and options in tables and selections: ``budget.examples``, ``adapter.rank``.

An option has the name of its key in the experiment file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from harness.core.naming import flatten

# Not options: plugins, and what follows from other columns; method, grouping, learning rate and seed have short names.
_LEFT_OUT = re.compile(
    r"task\.(plugin|modalities|metrics|contexts)(\..*)?|adapter\.(plugins|label|method|grouping_name|learning_rate)"
    r"|adapter\.groups\.\w+\.plugins|optimizer\.learning_rate|seed|relative_to"
)
# Options of the task and the method, beside its other keys; of a group, where groups differ.
_CONFIG = re.compile(r"^(task|adapter|adapter\.groups\.\w+)\.config\.")
_OF_ENCODERS = "backbone.encoder_options."


def options_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The axes and options of a spec, or of some of its sections, by name."""
    named = ((_key(path), value) for path, value in flatten(spec))
    return {name: value for name, value in named if not _LEFT_OUT.fullmatch(name)}


def _key(path: str) -> str:
    """The key of the experiment file that says what a record has under ``path``."""
    return _CONFIG.sub(r"\1.", path).replace(_OF_ENCODERS, "backbone.encoders.")
