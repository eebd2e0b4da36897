"""The seam of a trial: what a search hands to a trainable, and what comes back. Runs in the trial's process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

Overrides = Mapping[str, Any]
"""Dotted configuration keys and their values, for example `{"model.timesteps": 2}`."""

EPOCH = "epoch"
BEST = "best"
"""Under this key a report says whether the trial keeps this epoch's weights as its best so far: 1 or 0."""
ROW = "search/row"
"""Under this key a report carries all its metrics as JSON, apart from what Ray Tune adds to it."""
END = "search/end"
"""Under this key a trial's last report carries its end as JSON: status, figures and reason."""


class Report(Protocol):
    """What a trial calls after each epoch, with the metrics of that epoch and `epoch`, the number of epochs done.

    A trial that keeps its best weights says with `best` which those are; of one that does not, the epoch that is best
    by the deciding metric counts.
    Raises TrialPruned when the loss is not finite: let it pass. It does not return when the trial is stopped early.
    `checkpoint` is a directory from which another trial can go on; the scheduler pbt needs it, others ignore it.
    """

    @property
    def start_from(self) -> Path | None:
        """Where pbt wants this trial to start: a directory that a trial reported. Goes before its own checkpoints."""

    def __call__(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None: ...


Trainable = Callable[[Overrides, str, Report], Mapping[str, float]]
"""(overrides, name of the trial, report) -> figures of its best checkpoint.

Runs in the trial's own process. Started again by the same name, it should go on from where it was. With
`resources.workers` above 1 it starts their group itself, and the trial's process holds no CPU. The group must have
places of its own, as Ray Train's has; plain actors need `scheduling_strategy=PlacementGroupSchedulingStrategy(None)`,
or Ray looks for their CPUs among what the trial's process holds.
"""


class TrialPruned(Exception):  # noqa: N818 -- a verdict, not an error
    """Raised by a trainable whose training makes no sense any more, with the reason."""


class TuneReport:
    """Checks what a trial reports and hands it to Ray Tune."""

    def __init__(self, deciding: str | None, needs_checkpoint: bool, start_from: Path | None) -> None:
        self._deciding, self._needs_checkpoint = deciding, needs_checkpoint
        self._start_from = start_from
        self._count = 0

    @property
    def start_from(self) -> Path | None:
        return self._start_from

    def __call__(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        from ray import tune

        self._count += 1
        row = {key: float(value) for key, value in metrics.items()}
        row.setdefault(EPOCH, float(self._count))
        for key, value in row.items():
            if key.rsplit("/", 1)[-1] == "loss" and not math.isfinite(value):
                raise TrialPruned(f"{key} was {value} in epoch {row[EPOCH]:g}")
        if self._deciding is not None and self._deciding not in row:
            raise ValueError(
                f"the scheduler decides by {self._deciding!r}, and the trial reports {', '.join(sorted(row))}"
            )
        if self._needs_checkpoint and checkpoint is None:
            raise ValueError("the scheduler pbt needs a checkpoint with each report, and the trial gives none")
        kept = tune.Checkpoint.from_directory(str(checkpoint)) if checkpoint and self._needs_checkpoint else None
        seen = (
            {EPOCH: row[EPOCH]} if self._deciding is None else {EPOCH: row[EPOCH], self._deciding: row[self._deciding]}
        )
        tune.report({**seen, ROW: json.dumps(row)}, checkpoint=kept)


def tune_function(
    trainable: Trainable, search_name: str, objectives: Mapping[str, Any], deciding: str | None, needs_checkpoint: bool
) -> Callable[[dict[str, Any]], None]:
    """A function for Ray Tune that runs a trial and reports its end, whatever that is."""

    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        name = f"{search_name}-{tune.get_context().get_trial_id()}"
        with ExitStack() as stack:
            held = tune.get_checkpoint()
            start_from = Path(stack.enter_context(held.as_directory())) if held is not None else None
            report = TuneReport(deciding, needs_checkpoint, start_from)
            end = _end_of(lambda: trainable(config["overrides"], name, report), objectives)
        tune.report({END: json.dumps(end)})

    return trial


def _end_of(run: Callable[[], Mapping[str, float]], objectives: Mapping[str, Any]) -> dict[str, Any]:
    """Status, figures and reason of a trial."""
    try:
        figures = dict(run())
    except TrialPruned as verdict:
        return {"status": "pruned", "figures": {}, "reason": str(verdict) or "pruned without a reason"}
    except (Exception, SystemExit) as error:
        return {"status": "failed", "figures": {}, "reason": in_words(error)}
    kept = finite(figures)
    if lost := [name for name in objectives if name in figures and name not in kept]:
        return {"status": "pruned", "figures": kept, "reason": f"{lost[0]} was {figures[lost[0]]}"}
    if missing := [name for name in objectives if name not in kept]:
        listed = ", ".join(sorted(kept)) or "nothing"
        return {"status": "failed", "figures": kept, "reason": f"no {missing[0]!r} came back, but {listed}"}
    return {"status": "finished", "figures": kept, "reason": ""}


def in_words(error: BaseException) -> str:
    """An error in one line of at most 500 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[-1] if lines else ""
    told = said if said.startswith(type(error).__name__) else f"{type(error).__name__}: {said}".rstrip(": ")
    return told if len(told) <= 500 else f"{told[:497]}..."


def finite(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures that are finite numbers."""
    return {
        key: float(value)
        for key, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
