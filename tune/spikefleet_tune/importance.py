"""What decides an objective: the share of its variance that each key explains, with the uncertainty of that share.

fANOVA (Hutter et al., ICML 2014) by Optuna: a random forest over the trials, whose predictions are taken apart. A share
from a few trials may be chance. So the trials are drawn again with replacement, and the shares computed for each draw:
where the interval of a key reaches down to that of a key that cannot matter, the order of the two says nothing. Trials
that are drawn twice let a forest fit closer than new trials would, so intervals are rather too narrow than too wide.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence

import optuna

from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.result import SearchResult
from spikefleet_tune.samplers import study_of
from spikefleet_tune.space import label

FEWEST_FOR_IMPORTANCE = 8
"""Trials with values that parameter importance needs."""

RESAMPLES = 20
_TREES_OF_RESAMPLES = 8
_TREES = 64  # Optuna's number

METHOD = f"fANOVA; intervals are the 5 % and 95 % quantiles over {RESAMPLES} bootstrap resamples of the trials"
"""How importance and its intervals are computed, in words."""

Intervals = dict[str, tuple[float, float]]
"""By key, the lower and the upper end."""


def importance(result: SearchResult) -> dict[str, dict[str, float] | str]:
    """The share of each objective's variance that each key explains (fANOVA), largest first.

    Only keys that every trial has are evaluated.

    Returns:
        By objective, the shares by key; or the reason why there are none: fewer than eight trials with values, an
        objective that does not vary, or no key that varies.
    """
    return {
        name: _importance(result, position) if reason is None else reason
        for position, (name, reason) in enumerate(importance_reasons(result).items())
    }


def importance_intervals(result: SearchResult) -> dict[str, Intervals]:
    """The interval of each share of `importance`, see `METHOD`; empty for an objective without importance.

    A resample in which the objective or all keys are constant is left out.
    """
    found: dict[str, Intervals] = {}
    for position, (name, reason) in enumerate(importance_reasons(result).items()):
        found[name] = _intervals(result, position) if reason is None else {}
    return found


def importance_reasons(result: SearchResult) -> dict[str, str | None]:
    """By objective, why there is no importance; None where there is one."""
    trials = result.comparable
    reasons: dict[str, str | None] = {}
    for name in result.search.objectives:
        reasons[name] = None
        if len(trials) < FEWEST_FOR_IMPORTANCE:
            reasons[name] = f"needs {FEWEST_FOR_IMPORTANCE} trials with values, found {len(trials)}"
        elif len({record.metrics[name] for record in trials}) == 1:
            reasons[name] = "all trials have the same value"
        elif not _shared(result, trials):
            reasons[name] = "no key that all trials have varies"
    return reasons


def _intervals(result: SearchResult, position: int) -> Intervals:
    drawn: dict[str, list[float]] = {key: [] for key in _shared(result, result.comparable)}
    rng = random.Random(result.search.seed)
    for _ in range(RESAMPLES):
        trials = rng.choices(result.comparable, k=len(result.comparable))
        name = list(result.search.objectives)[position]
        if len({record.metrics[name] for record in trials}) == 1:
            continue
        shares = _shares(result, trials, position, _TREES_OF_RESAMPLES)
        for key, values in drawn.items():
            values.append(shares.get(key, 0.0))  # a key that is constant in the draw explains nothing
    return {key: _ends(values) for key, values in drawn.items() if values}


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The 5 % and 95 % quantiles."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.05 * last)], ordered[round(0.95 * last)]


def _shared(result: SearchResult, trials: Sequence[TrialRecord]) -> list[str]:
    """Keys that all trials have, and that vary over them."""
    varied = {key for key in result.search.space if len({label(one.point.get(key)) for one in trials}) > 1}
    return [key for key in result.search.space if key in varied and all(key in one.point for one in trials)]


def _importance(result: SearchResult, position: int) -> dict[str, float]:
    return _shares(result, result.comparable, position, _TREES)


def _shares(result: SearchResult, trials: Sequence[TrialRecord], position: int, trees: int) -> dict[str, float]:
    rows = [(record.point, record.values(result.search.objectives) or ()) for record in trials]
    shared = _shared(result, trials)
    if not shared:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=trees, seed=result.search.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = optuna.importance.get_param_importances(
            study_of(result.search, rows), evaluator=evaluator, params=shared, target=lambda one: one.values[position]
        )
    return {key: round(float(share), 4) for key, share in shares.items()}
