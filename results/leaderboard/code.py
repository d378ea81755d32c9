"""With what code trials were made: rows that mix versions, or that others of their table do not share, are marked.

A grid that is extended after a change of the code would otherwise compare the change along with the methods.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from harness.core.record import TrialRecord
from harness.core.registry import plugins_in

HARNESS = "context-peft-harness"  # the distribution
# Libraries whose versions change scores, as recorded; the jars of the caption metrics are part of pycocoevalcap.
LIBRARIES = ("torch", "transformers", "tokenizers", "deepspeed", "peft", "pycocoevalcap", "jiwer", "rouge-score")
Code = Mapping[str, str]  # distribution → "0.1.0 (1b90bd6)": its version and git revision


def code_of(record: TrialRecord) -> Code:
    """The versions of the harness, of plugins and of libraries that a trial was made with, as far as recorded."""
    found: dict[str, tuple[str | None, str | None]] = {
        plugin.distribution: (plugin.version, plugin.git_revision)
        for plugin in plugins_in(record.spec)
        if plugin.version
    }
    found[HARNESS] = record.versions.get(HARNESS), record.git_revision
    found |= {name: (record.versions[name], None) for name in LIBRARIES if name in record.versions}
    return {
        name: f"{version or 'unknown'} ({revision})" if revision else version or "unknown"
        for name, (version, revision) in found.items()
    }


def mixed_versions(records: Iterable[TrialRecord]) -> str | None:
    """The versions of the harness, of plugins and of libraries that differ between trials; None: they are alike.

    ``its trials mix versions: context-peft-harness 0.1.0 (1b90bd6) and 0.2.0 (105a6c3)``
    """
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for distribution, text in code_of(record).items():
            found.setdefault(distribution, {})[text] = None
    words = [f"{name} {' and '.join(versions)}" for name, versions in found.items() if len(versions) > 1]
    return f"its trials mix versions: {'; '.join(words)}" if words else None


def other_code(tables: Sequence[Sequence[TrialRecord]]) -> list[str | None]:
    """For each row of a table, what its trials were made with that most trials of the table were not; None: nothing.

    ``made with context-peft-harness 0.2.0 (105a6c3), most of the table with 0.1.0 (1b90bd6)``

    Args:
        tables: the trials of each row.
    """
    codes = [[code_of(record) for record in row] for row in tables]
    names = dict.fromkeys(name for row in codes for code in row for name in code)
    found = {name: Counter(code[name] for row in codes for code in row if name in code) for name in names}
    usual = {name: counts.most_common(1)[0][0] for name, counts in found.items()}
    return [_difference(row, usual) for row in codes]


def _difference(row: Sequence[Code], usual: Code) -> str | None:
    other = {name: text for code in row for name, text in code.items() if text != usual[name]}
    words = [f"{name} {text}, most of the table with {usual[name]}" for name, text in other.items()]
    return f"made with {'; '.join(words)}" if words else None
