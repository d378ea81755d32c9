"""The plan in the terminal."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from harness.core.record import Parameters, Plan, PlannedTrial

SHOWN_ROWS = 500  # of a plan; a terminal takes a millisecond for each
UNBOUNDED = 1_000  # characters: wider than any row
_LONG = 20  # characters of a setting that leave a terminal no room for the names of methods


def numbered_settings(plan: Plan) -> dict[str, str]:
    """Settings as tables name them in a terminal: by numbers if one of them is long, otherwise an empty mapping."""
    settings = list(dict.fromkeys(setting for _, _, setting in plan.rows()))
    if max(map(len, settings), default=0) <= _LONG:
        return {}
    return {setting: str(number) for number, setting in enumerate(settings, start=1)}


def plan_table(
    plan: Plan,
    parameters: Mapping[str, Parameters | None],
    states: Mapping[str, str],
    most: int | None = None,
    names: Mapping[str, str] | None = None,
) -> Table:
    """The rows of a plan, one line each, with their learning rates, seeds and numbers of parameters.

    Args:
        plan: all trials.
        parameters: by the id of the first trial of each row; None if the configuration of a backbone could not be
            loaded.
        states: by trial id: "finished", "failed", "to run".
        most: how many rows are shown; None: all.
        names: of settings, where they are shown by other ones than their own.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title_justify="left")
    table.title = f"{plan.experiment}: {len(plan.trials):,} trial{'s' * (len(plan.trials) != 1)}"
    rows = plan.rows()
    with_setting = any(setting for _, _, setting in rows)
    with_rates = any(len({trial.learning_rate for trial in trials}) > 1 for trials in rows.values())
    headings = {"method": True, "#" if names else "setting": with_setting, "learning rates": with_rates, "seeds": True}
    for heading in (name for name, shown in headings.items() if shown):
        table.add_column(heading, no_wrap=heading in {"learning rates", "seeds"})
    for heading in ("trainable", "adapter", "projector", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for (label, grouping, setting), trials in itertools.islice(rows.items(), most):
        counts = parameters[trials[0].trial_id]
        numbers = (counts.trainable, counts.adapter, counts.projector, counts.total) if counts else ()
        cells = [f"{n:,}" for n in numbers] or ["unknown"] * 4
        name = f"{label} {grouping}".rstrip()
        shown = (names or {}).get(setting, setting)
        varying = [*([shown] if with_setting else []), *([_rates(trials)] if with_rates else [])]
        states_of = ", ".join(
            f"{count:,} {state}" for state, count in Counter(states[t.trial_id] for t in trials).items()
        )
        table.add_row(name, *varying, seed_ranges({trial.seed for trial in trials}), *cells, states_of)
    if most is not None and len(rows) > most:
        table.caption, table.caption_justify = f"… and {len(rows) - most:,} rows more; --all shows them", "left"
    return table


def _rates(trials: Sequence[PlannedTrial]) -> str:
    """``3 candidates, 0.001–0.01``; of a single one its value."""
    rates = sorted({trial.learning_rate for trial in trials if trial.learning_rate is not None})
    if len(rates) < 2:
        return f"{rates[0]:g}" if rates else "–"
    return f"{len(rates)} candidates, {rates[0]:g}–{rates[-1]:g}"


def seed_ranges(seeds: Iterable[int]) -> str:
    """``0–4, 7``: two neighbours are listed, three or more are a range."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
