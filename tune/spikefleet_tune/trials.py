"""The interface of a trial: what a search passes to a trainable, and what it returns. Runs in the trial's process."""

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
"""Key of a report: 1 if the trial keeps this epoch's weights as its best so far, else 0."""
ROW = "search/row"
"""Key of a report: all its metrics as JSON, without those that Ray Tune adds."""
END = "search/end"
"""Key of a trial's last report: status, metrics and reason as JSON."""
INTERRUPTED = "interrupted"
"""Status in the last report of a trial that stopped with its search; in the journal it stays unfinished."""


class Report(Protocol):
    """Reports the metrics of an epoch to the search; a trainable calls it after each epoch."""

    @property
    def start_from(self) -> Path | None:
        """The checkpoint that pbt makes this trial start from, a directory that a trial reported; None for its own."""

    def __call__(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        """Reports an epoch. Does not return if the trial is stopped early.

        Args:
            metrics: of the epoch, with `epoch`, the number of finished epochs, and `best` (1 or 0), whether the trial
                keeps the weights of this epoch. Without `best`, the epoch that is best by the deciding metric counts.
            checkpoint: a directory from which another trial can resume; the scheduler pbt needs it.

        Raises:
            TrialPruned: a loss is not finite; do not catch it.
        """

    def stop_signal(self) -> str | None:
        """Name of the signal, such as SIGTERM, by which the search was asked to stop; None if it was not.

        A trainable that looks at it after each step, saves its state and raises TrialStopped loses nothing.
        """


Trainable = Callable[[Overrides, str, Report], Mapping[str, float]]
"""(overrides, name of the trial, report) -> metrics of its best checkpoint.

Runs in the trial's own process; a second call with the same name should resume. With `resources.workers` above 1 it
starts its own worker group, and the trial's process holds no CPU. The group needs its own placement group, as Ray
Train's has; plain actors need `scheduling_strategy=PlacementGroupSchedulingStrategy(None)`, or Ray takes their CPUs
from the trial's placement group.
"""


class TrialPruned(Exception):  # noqa: N818 -- a verdict, not an error
    """A trainable raises this, with the reason, if further training is pointless."""


class TrialStopped(Exception):  # noqa: N818 -- no error
    """A trainable raises this when the search was asked to stop, after it has saved the state to resume from."""


class TuneReport:
    """Checks the reports of a trial and passes them to Ray Tune.

    Args:
        deciding: metric by which the scheduler decides; every report must have it.
        needs_checkpoint: every report must have a checkpoint (pbt).
        start_from: checkpoint that the trial starts from.
        stop: file by which the driver asks its trials to stop, on storage that all nodes share.
    """

    def __init__(self, deciding: str | None, needs_checkpoint: bool, start_from: Path | None, stop: Path) -> None:
        self._deciding, self._needs_checkpoint = deciding, needs_checkpoint
        self._start_from, self._stop = start_from, stop
        self._count = 0

    @property
    def start_from(self) -> Path | None:
        """The checkpoint that the trial starts from; None for its own."""
        return self._start_from

    def stop_signal(self) -> str | None:
        """Name of the signal by which the search was asked to stop."""
        try:
            return str(json.loads(self._stop.read_text())["signal"])
        except FileNotFoundError:
            return None

    def __call__(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        """Reports an epoch; see `Report`.

        Raises:
            TrialPruned: a loss is not finite.
            ValueError: the deciding metric or the checkpoint is missing.
        """
        from ray import tune

        self._count += 1
        row = {key: float(value) for key, value in metrics.items()}
        row.setdefault(EPOCH, float(self._count))
        for key, value in row.items():
            if key.rsplit("/", 1)[-1] == "loss" and not math.isfinite(value):
                raise TrialPruned(f"{key} is {value} in epoch {row[EPOCH]:g}")
        if self._deciding is not None and self._deciding not in row:
            raise ValueError(
                f"the scheduler decides by {self._deciding!r}, but the trial reports {', '.join(sorted(row))}"
            )
        if self._needs_checkpoint and checkpoint is None:
            raise ValueError("the scheduler pbt needs a checkpoint with each report, but the trial reports none")
        kept = tune.Checkpoint.from_directory(str(checkpoint)) if checkpoint and self._needs_checkpoint else None
        seen = (
            {EPOCH: row[EPOCH]} if self._deciding is None else {EPOCH: row[EPOCH], self._deciding: row[self._deciding]}
        )
        tune.report({**seen, ROW: json.dumps(row)}, checkpoint=kept)


def tune_function(
    trainable: Trainable,
    search_name: str,
    objectives: Mapping[str, Any],
    deciding: str | None,
    needs_checkpoint: bool,
    stop: Path,
) -> Callable[[dict[str, Any]], None]:
    """A function for Ray Tune that runs a trial and reports its status at the end.

    Args:
        trainable: runs the trial.
        search_name: prefix of the trial's name.
        objectives: metrics that the trainable must return.
        deciding: metric by which the scheduler decides; None without a scheduler.
        needs_checkpoint: each report needs a checkpoint (pbt).
        stop: file by which the driver asks its trials to stop.
    """

    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        name = f"{search_name}-{tune.get_context().get_trial_id()}"
        with ExitStack() as stack:
            held = tune.get_checkpoint()
            start_from = Path(stack.enter_context(held.as_directory())) if held is not None else None
            report = TuneReport(deciding, needs_checkpoint, start_from, stop)
            end = _end_of(lambda: trainable(config["overrides"], name, report), objectives)
        tune.report({END: json.dumps(end)})

    return trial


def _end_of(run: Callable[[], Mapping[str, float]], objectives: Mapping[str, Any]) -> dict[str, Any]:
    """Status, metrics and reason of a trial."""
    try:
        metrics = dict(run())
    except TrialPruned as verdict:
        return {"status": "pruned", "metrics": {}, "reason": str(verdict) or "pruned without a reason"}
    except TrialStopped:
        return {"status": INTERRUPTED, "metrics": {}, "reason": ""}
    except (Exception, SystemExit) as error:
        return {"status": "failed", "metrics": {}, "reason": describe_error(error)}
    kept = finite(metrics)
    if lost := [name for name in objectives if name in metrics and name not in kept]:
        return {"status": "pruned", "metrics": kept, "reason": f"{lost[0]} is {metrics[lost[0]]}"}
    if missing := [name for name in objectives if name not in kept]:
        listed = ", ".join(sorted(kept)) or "nothing"
        reason = f"the trainable returned no {missing[0]!r}, found {listed}"
        return {"status": "failed", "metrics": kept, "reason": reason}
    return {"status": "finished", "metrics": kept, "reason": ""}


def describe_error(error: BaseException) -> str:
    """The type and the last line of an error, in at most 500 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[-1] if lines else ""
    name = type(error).__name__
    line = message if message.startswith(name) else f"{name}: {message}".rstrip(": ")
    return line if len(line) <= 500 else f"{line[:497]}..."


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are finite numbers."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
