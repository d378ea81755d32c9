"""Proposes learning rates: a grid, or one of Optuna's samplers. The only module that imports optuna.

Candidates depend on the search, its seed and, for the samplers that learn, on the results of earlier candidates of the
same row, never on time. Rates are rounded to four significant digits, so that trial ids are the same on every machine.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.core.errors import UserError
from harness.core.search import ADAPTIVE, Range, Search

Results = Sequence[tuple[float, float | None]]  # learning rate, mean validation perplexity (None: it failed)
_NAME = "learning_rate"
_TRIES = 32  # proposals for a candidate that is not one of the earlier ones


def first_candidates(search: Search) -> tuple[float, ...]:
    """The candidates that need no result: all of them, or for a sampler that learns the first half, drawn at random.

    A longer search with the same seed begins with the same candidates, except for "grid".

    Raises:
        UserError: the range is too narrow for so many different rates.
    """
    if not isinstance(search.learning_rate, Range):
        return search.learning_rate
    if search.sampler == "grid":
        return _distinct([_rounded(rate, search.learning_rate) for rate in _grid(search)], search)
    count = math.ceil(search.candidates / 2) if search.sampler in ADAPTIVE else search.candidates
    study, space = _study("qmc" if search.sampler == "qmc" else "random", search.seed), _space(search.learning_rate)
    if search.sampler == "qmc":  # a study's first trial is drawn at random, unless one is known
        study.add_trial(_known(space, sum(search.learning_rate.ends) / 2, 0.0))
    drawn = [study.ask(space).params[_NAME] for _ in range(count)]
    return _distinct([_rounded(rate, search.learning_rate) for rate in drawn], search)


def next_candidate(search: Search, results: Results) -> float:
    """The next candidate of a sampler that learns, given the results of all earlier ones.

    Raises:
        UserError: the range is too narrow for another rate.
    """
    assert isinstance(search.learning_rate, Range)  # noqa: S101 - checked when the search is read
    space, earlier = _space(search.learning_rate), {rate for rate, _ in results}
    known = [_known(space, rate, score) for rate, score in results if score is not None]
    for attempt in range(_TRIES):
        seed = int(np.random.SeedSequence([search.seed, len(results), attempt]).generate_state(1)[0])
        # The optimum of a model is proposed again and again where the model is sure of it.
        sampler = search.sampler if known and attempt < _TRIES // 2 else "random"
        study = _study(sampler, seed)
        study.add_trials(known)
        rate = _rounded(study.ask(space).params[_NAME], search.learning_rate)
        if rate not in earlier:
            return rate
    raise _too_narrow(search)


def _grid(search: Search) -> list[float]:
    assert isinstance(search.learning_rate, Range)  # noqa: S101
    low, high = search.learning_rate.ends
    if search.candidates == 1:
        return [math.sqrt(low * high) if search.learning_rate.log_uniform else (low + high) / 2]
    spaced = np.geomspace if search.learning_rate.log_uniform else np.linspace
    return [float(rate) for rate in spaced(low, high, search.candidates)]


def _study(sampler: str, seed: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "random": (optuna.samplers.RandomSampler, {}),
        "qmc": (optuna.samplers.QMCSampler, {"scramble": True}),
        "tpe": (optuna.samplers.TPESampler, {"n_startup_trials": 1}),
        "gp": (optuna.samplers.GPSampler, {"n_startup_trials": 1}),
    }
    kind, options = kinds[sampler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.create_study(sampler=kind(seed=seed, **options))  # minimizes


def _space(given: Range) -> dict[str, Any]:
    from optuna.distributions import FloatDistribution

    return {_NAME: FloatDistribution(*given.ends, log=given.log_uniform is not None)}


def _known(space: dict[str, Any], rate: float, score: float) -> Any:
    import optuna

    return optuna.trial.create_trial(params={_NAME: rate}, distributions=space, value=score)


def _rounded(rate: float, given: Range) -> float:
    low, high = given.ends
    return min(max(float(f"{rate:.4g}"), low), high)


def _distinct(rates: list[float], search: Search) -> tuple[float, ...]:
    if len(set(rates)) < len(rates):
        raise _too_narrow(search)
    return tuple(rates)


def _too_narrow(search: Search) -> UserError:
    assert isinstance(search.learning_rate, Range)  # noqa: S101
    low, high = search.learning_rate.ends
    return UserError(
        f"{low:g} to {high:g} is too narrow for {search.candidates} learning rates that differ in four digits"
    )
