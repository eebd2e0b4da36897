"""Early stopping: whether the validation metric has stopped to improve, from the history of the epochs alone.

A pure function of the history, so that a resumed run stops where the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from spikefleet.config.schema import Config


def last_improvement(config: Config, history: Sequence[Mapping[str, float]]) -> int | None:
    """The epoch of the last improvement of the validation metric by more than `train.min_delta`.

    Args:
        config: of the run.
        history: metrics of each finished epoch.

    Returns:
        The epoch, from 1; 0 where nothing that was measured is finite, and None where nothing was measured.
    """
    key, sign = f"val/{config.checkpoint.metric}", 1.0 if config.checkpoint.mode == "max" else -1.0
    best: float | None = None
    epoch: int | None = None
    for row in history:
        if key not in row:
            continue
        epoch = epoch or 0
        if math.isfinite(row[key]) and (best is None or sign * row[key] > best + config.train.min_delta):
            best, epoch = sign * row[key], int(row["epoch"])
    return epoch


def stops_early(config: Config, history: Sequence[Mapping[str, float]]) -> str | None:
    """Whether a training ends before its last epoch.

    Args:
        config: of the run.
        history: metrics of each finished epoch.

    Returns:
        Why, as a sentence; None if training continues.
    """
    patience, since = config.train.patience, last_improvement(config, history)
    segment = config.train.segment
    if since is not None and segment is not None:
        since = max(since, segment.from_epoch)
    if patience is None or since is None or len(history) >= config.train.epochs or len(history) - since < patience:
        return None
    if f"val/{config.checkpoint.metric}" not in history[-1]:  # the next evaluation may be better
        return None
    than = f" by more than {config.train.min_delta:g}" if config.train.min_delta else ""
    if since == 0:
        return (
            f"stopping early after epoch {len(history)}: val/{config.checkpoint.metric} was never a finite number "
            f"(train.patience={patience})"
        )
    return (
        f"stopping early after epoch {len(history)}: val/{config.checkpoint.metric} has not improved{than} since epoch "
        f"{since} (train.patience={patience})"
    )
