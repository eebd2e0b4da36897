"""What a person sees of a run: a live bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from spikefleet import status
from spikefleet.status import PLAIN_LINES, PlainLines, print_line
from spikefleet.training.events import EpochDone, Event, Note, Phase, Started, StepDone, Waiting, WorkerFailed
from spikefleet_tune.messages import counted

_WIDE = 110
"""Columns of a terminal on which a long bar leaves room for the metrics beside it."""


class Display(Protocol):
    """Draws events."""

    def show(self, event: Event) -> None: ...

    def announce(self, what: str) -> None:
        """Names what begins now and is no training step, such as "starting Ray workers"."""

    def close(self) -> None: ...


def build_display(console: Console) -> Display:
    """Live on a terminal, plain elsewhere."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class LiveDisplay:
    """One bar over all steps, with metrics, rate and remaining time, or with what is waited for and its seconds.

    Epochs scroll by above it.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=40 if console.width >= _WIDE else 10),
            MofNCompleteColumn(),
            _Doing(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("train", total=None, epoch="-", doing="", since=None)
        self._epochs = 0
        self._headline: tuple[str, ...] = ()
        self._metrics = ""
        self._progress.start()

    def announce(self, what: str) -> None:
        self._progress.update(self._task, doing=what, since=time.monotonic())

    def show(self, event: Event) -> None:
        match event:
            case Started():
                self._epochs, self._headline = event.epochs, event.headline
                self._progress.update(self._task, total=event.total_steps, completed=event.step)
                self.announce("warming up")
            case StepDone():
                self._metrics = _step_metrics(event.metrics, self._headline)
                self._progress.update(self._task, epoch=f"{event.epoch + 1}/{self._epochs}")
                self._progress.update(self._task, completed=event.step, doing=self._metrics, since=None)
            case EpochDone():
                self._progress.update(self._task, completed=event.step, doing=self._metrics, since=None)
                width = self._progress.console.width
                self._print(_epoch_line(event, self._epochs, self._headline, width))
            case WorkerFailed():
                self._print(f"a worker failed: {event.reason}", style="yellow")
                self.announce("restarting")
            case Waiting():
                self._print(event.what, style="yellow")
                self.announce(event.what)
            case Note():
                self._print(event.text)
            case Phase():
                self.announce(event.what)
            case _:
                pass

    def close(self) -> None:
        self._progress.stop()

    def _print(self, line: str, style: str | None = None) -> None:
        print_line(self._progress.console, line, style)


class _Doing(ProgressColumn):
    """Metrics of the latest step, or what is waited for with its seconds."""

    def render(self, task: Task) -> Text:
        doing, since = task.fields["doing"], task.fields["since"]
        return Text(doing if since is None else f"{doing}  {time.monotonic() - since:.0f} s")


class PlainDisplay:
    """A line for each epoch, and one every quarter of a minute within long ones and within what is no training."""

    def __init__(self, console: Console, lines: PlainLines = PLAIN_LINES) -> None:
        self._console, self._lines = console, lines
        self._waiting = status.Waiting(console, lines)
        self._epochs = self._total = 0
        self._headline: tuple[str, ...] = ()
        self._began = time.monotonic()
        self._first_step = 0

    def announce(self, what: str) -> None:
        self._waiting.announce(what)

    def show(self, event: Event) -> None:
        match event:
            case Started():
                self._epochs, self._total, self._first_step = event.epochs, event.total_steps, event.step
                self._headline = event.headline
                self._began = time.monotonic()
                steps = counted(event.steps_per_epoch, "step")
                self._print(f"{counted(event.epochs, 'epoch')} of {steps}, from step {event.step}")
                self.announce("warming up")
            case StepDone():
                where = f"epoch {event.epoch + 1}/{self._epochs}  step {event.step}/{self._total}"
                metrics = _step_metrics(event.metrics, self._headline)
                self._lines.say(self._console, f"{where}  {metrics}{self._remaining(event.step)}")
                self._waiting.announce(f"{where}: training", often=True)
            case EpochDone():
                self._print(f"{_epoch_line(event, self._epochs, self._headline)}{self._remaining(event.step)}")
                self._waiting.announce(f"after epoch {event.epoch}/{self._epochs}", often=True)
            case WorkerFailed():
                self._print(f"a worker failed: {event.reason}")
                self.announce("restarting")
            case Waiting():
                self._print(event.what)
                self.announce(event.what)
            case Note():
                self._print(event.text)
            case Phase():
                self.announce(event.what)
            case _:
                pass

    def close(self) -> None:
        self._waiting.close()

    def _print(self, line: str) -> None:
        self._lines.printed()
        print_line(self._console, line)

    def _remaining(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0 or step >= self._total:
            return ""
        seconds = (time.monotonic() - self._began) / done * (self._total - step)
        return f"  {seconds // 60:.0f} min {seconds % 60:.0f} s left"


def _step_metrics(metrics: Mapping[str, float], headline: Sequence[str]) -> str:
    parts = [f"loss {metrics['train/loss']:.3f}"]
    parts += [f"{name} {metrics[f'train/{name}']:.1%}" for name in headline if f"train/{name}" in metrics]
    if "images_per_second" in metrics:
        parts.append(f"{metrics['images_per_second']:.0f} images/s")
    return "  ".join(parts)


def _epoch_line(event: EpochDone, epochs: int, headline: Sequence[str], width: int | None = None) -> str:
    """Metrics of an epoch under their names in MLflow, or under short ones where a terminal's `width` is too small."""
    forms = {"train/loss": ".4f"}
    forms |= {f"{split}/{name}": ".2%" for split in ("train", "val") for name in headline}
    forms |= {"spikes/firing_rate": ".3f"}
    measured = {key: f"{event.metrics[key]:{form}}" for key, form in forms.items() if key in event.metrics}
    best = ["best"] if event.best else []

    def line(names: Mapping[str, str]) -> str:
        shown = (f"{names.get(key, key.removeprefix('train/'))} {value}" for key, value in measured.items())
        return "  ".join([f"epoch {event.epoch:>{len(str(epochs))}}/{epochs}", *shown, *best])

    whole = line({key: key for key in measured})
    short = {key: key for key in measured if not key.startswith("train/")} | {"spikes/firing_rate": "firing"}
    return whole if width is None or len(whole) <= width else line(short)
