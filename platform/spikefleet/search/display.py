"""What a running search shows: a bar with trials and ETA on a terminal, a line for each trial everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spikefleet.status import PLAIN_LINES, Waiting, print_line
from spikefleet.stop_signals import STOPPING
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.ledger import Counts, TrialStart
from spikefleet_tune.search_file import Search


class SearchDisplay:
    """An observer of a search that draws it; a context manager."""

    def __init__(self, console: Console, search: Search) -> None:
        self._console, self._search = console, search
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("trials"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting Ray Tune", total=search.budget.trials)
        self._waiting = Waiting(console)

    def __enter__(self) -> Self:
        self._bar.start()
        self._say_doing("starting Ray Tune")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.close()
        self._bar.stop()

    def on_trial_started(self, trial: TrialStart, counts: Counts) -> None:
        self._update(counts)
        self._say_doing(f"{trial.name} starting")

    def on_trial_reported(self, trial: TrialStart, metrics: Mapping[str, float]) -> None:
        shown = [f"{name} {metrics[name]:.4g}" for name in self._search.objectives if name in metrics]
        epoch = f"epoch {metrics['epoch']:.0f}" if "epoch" in metrics else ""
        self._say_doing(" ".join([trial.name, epoch, *shown]))

    def on_trial_finished(self, record: TrialRecord, counts: Counts) -> None:
        known = [name for name in self._search.objectives if name in record.metrics]
        figures = "  ".join(f"{name} {record.metrics[name]:.4g}" for name in known)
        self._say(record, counts, figures)

    def on_trial_pruned(self, record: TrialRecord, counts: Counts) -> None:
        self._say(record, counts, f"pruned: {record.reason}")

    def on_trial_failed(self, record: TrialRecord, counts: Counts) -> None:
        self._say(record, counts, f"failed: {record.reason}")

    def on_trial_lost(self, trial: TrialStart, reason: str) -> None:
        PLAIN_LINES.printed()
        print_line(self._bar.console, f"trial {trial.name}  runs again: {reason}")

    def on_waiting(self, what: str) -> None:
        if not what:
            self._say_doing("waiting for a trial")
            return
        PLAIN_LINES.printed()
        print_line(self._bar.console, what)
        if self._console.is_terminal:
            self._say_doing(what)
        else:
            self._waiting.announce(what)

    def on_stopping(self) -> None:
        print_line(self._bar.console, STOPPING)

    def _say(self, record: TrialRecord, counts: Counts, what: str) -> None:
        self._update(counts)
        done = f"{counts.done}/{counts.total}" if counts.total else str(counts.done)
        point = " ".join(f"{key}={_plain(value)}" for key, value in record.point.items())
        line = f"trial {done}  {record.name}  {what}  ({record.seconds:.0f} s)  {point}"
        PLAIN_LINES.printed()
        print_line(self._bar.console, line)
        self._say_doing("waiting for a trial")

    def _say_doing(self, what: str) -> None:
        """On a terminal in the bar; elsewhere in a line, at most one every 15 s."""
        if self._console.is_terminal:
            self._bar.update(self._task, description=what)
        else:
            self._waiting.announce(f"searching: {what}", often=True)

    def _update(self, counts: Counts) -> None:
        self._bar.update(self._task, completed=counts.done, total=counts.total)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
