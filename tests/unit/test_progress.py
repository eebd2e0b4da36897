"""What is shown of a run, on a terminal and elsewhere."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from spikefleet import status
from spikefleet.runs.progress import LiveDisplay, PlainDisplay, build_display
from spikefleet.status import PlainLines
from spikefleet.training.events import (
    CheckpointSaved,
    EpochDone,
    Event,
    Note,
    Phase,
    Started,
    StepDone,
    Waiting,
    WorkerFailed,
)

METRICS = {"train/loss": 0.5, "train/top1": 0.75, "images_per_second": 1234.0}
RUN: list[Event] = [
    Started(step=0, total_steps=20, steps_per_epoch=10, epochs=2, headline=("top1",)),
    StepDone(epoch=0, step=10, metrics=METRICS),
    EpochDone(epoch=1, step=10, metrics={"train/loss": 0.5, "val/top1": 0.8}, best=True),
    CheckpointSaved(step=10, path="checkpoints/step-00000010"),
    WorkerFailed("rank 0: [/__w/torch/pair.cc:545] Read error [127.0.0.1]:1234"),
    Note("resuming from step-00000010 [bold]"),
    Phase("testing"),
    Started(step=10, total_steps=20, steps_per_epoch=10, epochs=2, headline=("top1",)),
    StepDone(epoch=1, step=20, metrics=METRICS),
]


@pytest.mark.parametrize("terminal", [True, False])
def test_every_event_is_shown_as_it_is(terminal: bool) -> None:
    """Square brackets in the words of a library are no markup: rich would raise, or swallow them."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=200, color_system=None)
    display = build_display(console)
    assert isinstance(display, LiveDisplay if terminal else PlainDisplay)
    for event in RUN:
        display.show(event)
    display.close()
    shown = written.getvalue()
    for part in ("epoch 1/2", "val/top1 80.00%", "best", "[/__w/torch/pair.cc:545] Read error", "[bold]"):
        assert part in shown
    assert ("1234 images/s" in shown) == terminal
    assert (" s left" in shown) != terminal


PHASES = (
    (Started(0, 20, 10, 2), "warming up"),
    (Phase("validating"), "validating"),
    (Phase("testing"), "testing"),
    (WorkerFailed("lost"), "restarting"),
    (Waiting("it waits", 0.0), "it waits"),
)


@pytest.mark.parametrize(("event", "named"), PHASES)
@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_no_training_step_is_named_while_it_takes(
    terminal: bool, event: Event, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_PLAIN_AFTER_S", 0.05)
    monkeypatch.setattr(status, "_LOOK_EVERY_S", 0.01)
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=120, color_system=None)
    display = LiveDisplay(console) if terminal else PlainDisplay(console, PlainLines(every_s=0))
    display.show(event)
    time.sleep(0.3)
    display.show(StepDone(epoch=0, step=1, metrics=METRICS))
    display.close()
    assert f"{named}  0 s" in written.getvalue() or f"{named}: 0 s so far" in written.getvalue()
    last = written.getvalue().rstrip().splitlines()[-2:]
    assert named not in last[-1]


EPOCH = EpochDone(
    epoch=7,
    step=10,
    metrics={"train/loss": 2.31, "train/top1": 1.0, "val/top1": 1.0, "spikes/firing_rate": 0.148},
    best=True,
)
NARROW = "epoch   7/300  loss 2.3100  top1 100.00%  val/top1 100.00%  firing 0.148  best"
WIDE = "epoch   7/300  train/loss 2.3100  train/top1 100.00%  val/top1 100.00%  spikes/firing_rate 0.148  best"


@pytest.mark.parametrize(("terminal", "width", "line"), [(True, 80, NARROW), (True, 120, WIDE), (False, 80, WIDE)])
def test_an_epoch_is_one_line(terminal: bool, width: int, line: str) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=width, color_system=None)
    display = build_display(console)
    display.show(Started(step=0, total_steps=10, steps_per_epoch=10, epochs=300, headline=("top1",)))
    display.show(EPOCH)
    display.close()
    assert line in [shown.strip("\r").rpartition("\x1b[2K")[2].rstrip() for shown in written.getvalue().splitlines()]
    assert all(shown == shown.rstrip() for shown in written.getvalue().splitlines()) or terminal
