"""What a person sees of a run: a live bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from spikefleet.training.events import CheckpointSaved, EpochDone, Event, Note, Started, StepDone, WorkerFailed

_PLAIN_LINE_EVERY_S = 15.0


class Display(Protocol):
    """Draws events."""

    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


def build_display(console: Console) -> Display:
    """Live on a terminal, plain elsewhere."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class LiveDisplay:
    """One bar over all steps with loss, accuracy, rate and remaining time; epochs scroll by above it."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("train", total=None, epoch="-", figures="starting")
        self._epochs = 0
        self._headline: tuple[str, ...] = ()
        self._progress.start()

    def show(self, event: Event) -> None:
        match event:
            case Started():
                self._epochs, self._headline = event.epochs, event.headline
                self._progress.update(self._task, total=event.total_steps, completed=event.step, figures="")
            case StepDone():
                self._progress.update(
                    self._task,
                    completed=event.step,
                    epoch=f"{event.epoch + 1}/{self._epochs}",
                    figures=_step_figures(event.metrics, self._headline),
                )
            case EpochDone():
                self._progress.update(self._task, completed=event.step)
                self._print(_epoch_line(event, self._epochs, self._headline))
            case WorkerFailed():
                self._print(f"a worker failed: {event.reason}", style="yellow")
            case Note():
                self._print(event.text)
            case CheckpointSaved():
                pass

    def close(self) -> None:
        self._progress.stop()

    def _print(self, line: str, style: str | None = None) -> None:
        # No markup: reasons of failures hold square brackets of their own.
        self._progress.console.print(line, style=style, markup=False, highlight=False)


class PlainDisplay:
    """A line for each epoch, and one every quarter of a minute within long ones."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._epochs = self._total = 0
        self._headline: tuple[str, ...] = ()
        self._began = self._printed = time.monotonic()
        self._first_step = 0

    def show(self, event: Event) -> None:
        match event:
            case Started():
                self._epochs, self._total, self._first_step = event.epochs, event.total_steps, event.step
                self._headline = event.headline
                self._began = self._printed = time.monotonic()
                self._print(f"{event.epochs} epochs of {event.steps_per_epoch} steps, from step {event.step}")
            case StepDone() if time.monotonic() - self._printed >= _PLAIN_LINE_EVERY_S:
                line = f"epoch {event.epoch + 1}/{self._epochs}  step {event.step}/{self._total}"
                self._print(f"{line}  {_step_figures(event.metrics, self._headline)}  {self._remaining(event.step)}")
            case EpochDone():
                self._print(f"{_epoch_line(event, self._epochs, self._headline)}  {self._remaining(event.step)}")
            case WorkerFailed():
                self._print(f"a worker failed: {event.reason}")
            case Note():
                self._print(event.text)
            case _:
                pass

    def close(self) -> None:
        return None

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _remaining(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0 or step >= self._total:
            return ""
        seconds = (time.monotonic() - self._began) / done * (self._total - step)
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s left"


def _step_figures(metrics: Mapping[str, float], headline: Sequence[str]) -> str:
    parts = [f"loss {metrics['train/loss']:.3f}"]
    parts += [f"{name} {metrics[f'train/{name}']:.1%}" for name in headline if f"train/{name}" in metrics]
    parts.append(f"{metrics['images_per_second']:.0f} images/s")
    return "  ".join(parts)


def _epoch_line(event: EpochDone, epochs: int, headline: Sequence[str]) -> str:
    forms = {"train/loss": ".4f"}
    forms |= {f"{split}/{name}": ".2%" for split in ("train", "val") for name in headline}
    forms |= {"spikes/firing_rate": ".3f"}
    shown = [f"epoch {event.epoch:>3}/{epochs}"]
    for key, form in forms.items():
        if key in event.metrics:
            shown.append(f"{key} {event.metrics[key]:{form}}")
    return "  ".join(shown) + ("  best" if event.best else "")
