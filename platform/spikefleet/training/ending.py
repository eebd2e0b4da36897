"""Why a training ends before its last epoch: its metric is no better, or its time is over."""

from __future__ import annotations

from dataclasses import dataclass

from spikefleet.training.early_stopping import stops_early
from spikefleet.training.splits import Splits
from spikefleet.training.state import TrainingState
from spikefleet.training.time_limit import no_time_left


@dataclass(frozen=True)
class Ending:
    """The end of a training before its last epoch."""

    why: str
    """As a sentence."""
    max_minutes: float | None = None
    """The limit, if that is the reason."""


def reason_to_end(state: TrainingState, splits: Splits) -> Ending | None:
    """Whether a training ends here, between two epochs. Collective with `train.max_minutes`.

    Its time is over only where the last epoch is measured, or, without a validation split, saved as the last one.

    Args:
        state: of the training.
        splits: of its data.

    Returns:
        Why; None if it continues.
    """
    reason = stops_early(state.config, state.history)
    if reason is not None:
        return Ending(reason)
    if not state.history or state.step_in_epoch:
        return None
    measured = f"val/{state.config.checkpoint.metric}" in state.history[-1]
    if not measured and (splits.val is not None or state.best is None or state.best["step"] != state.step):
        return None
    reason = out_of_time(state, state.epoch)
    return None if reason is None else Ending(reason, state.config.train.max_minutes)


def out_of_time(state: TrainingState, epochs: int) -> str | None:
    """Whether no time is left after so many epochs, by the clock of rank 0. Collective with `train.max_minutes`."""
    if state.config.train.max_minutes is None:
        return None
    reason: str | None = state.group.broadcast(no_time_left(state.config, epochs, state.clock))
    return reason
