"""Signs of life: what is waited for is named in time, and not too often."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from spikefleet import status
from spikefleet.status import PlainLines, Waiting, counting, print_line, print_whole, waiting


def console_of(terminal: bool) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=terminal, width=100, color_system=None), written


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is 20 times as fast, and no line printed before."""
    for name in ("_LIVE_AFTER_S", "_PLAIN_AFTER_S", "_LOOK_EVERY_S"):
        monkeypatch.setattr(status, name, getattr(status, name) / 20)
    monkeypatch.setattr(status, "PLAIN_LINES", PlainLines(every_s=0.2))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_wait_is_named_with_seconds(terminal: bool) -> None:
    console, written = console_of(terminal)
    with waiting(console, "starting [Ray]"):
        time.sleep(0.5)
    assert "starting [Ray]" in written.getvalue()
    assert " 0 s" in written.getvalue()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("terminal", [True, False])
def test_a_short_wait_is_not_named(terminal: bool) -> None:
    console, written = console_of(terminal)
    with waiting(console, "starting Ray"):
        pass
    assert written.getvalue() == ""


@pytest.mark.usefixtures("quick")
def test_what_begins_often_is_named_at_most_once_in_the_interval() -> None:
    console, written = console_of(terminal=False)
    lines = PlainLines(every_s=0.75)
    waits = Waiting(console, lines)
    began = time.monotonic()
    for what in ("step 1", "step 2", "step 3"):
        waits.announce(what, often=True)
        time.sleep(0.5)
    waits.close()
    most = 1 + int((time.monotonic() - began) / 0.75)
    said = written.getvalue().splitlines()
    assert 1 <= len(said) <= most
    assert said[0].startswith("step 1: ")


@pytest.mark.usefixtures("quick")
def test_each_wait_is_named_once_and_again_after_the_interval() -> None:
    console, written = console_of(terminal=False)
    waits = Waiting(console, PlainLines(every_s=60))
    for what in ("proof", "energy", "plots"):
        waits.announce(what)
        time.sleep(0.5)
    waits.close()
    assert [line.partition(":")[0] for line in written.getvalue().splitlines()] == ["proof", "energy", "plots"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_is_broken_between_words_on_a_terminal_and_nowhere_else(terminal: bool) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=40, color_system=None)
    digest = "0123456789abcdef" * 4
    print_line(console, f"trial 1/3  [0000]  val/top1 0.0979  energy_mj 0.0008768  {digest}  model.timesteps=2")
    lines = written.getvalue().splitlines()
    assert len(lines) == (4 if terminal else 1)
    assert " ".join(written.getvalue().split()) == (
        f"trial 1/3 [0000] val/top1 0.0979 energy_mj 0.0008768 {digest} model.timesteps=2"
    )
    print_whole(console, f"resume with: spikefleet tune {digest} --trials 3")
    assert len(written.getvalue().splitlines()) == len(lines) + 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_has_rate_and_remaining_time(terminal: bool) -> None:
    console, written = console_of(terminal)
    with counting(console, "evaluating") as count:
        for done in range(1, 6):
            time.sleep(0.15)
            count(done, 5)
    shown = written.getvalue()
    assert "evaluating" in shown
    assert "images" in shown
    assert "/s" in shown
    assert ("left" in shown) != terminal


def test_what_fails_is_not_waited_for_any_longer() -> None:
    console, _ = console_of(terminal=False)
    with pytest.raises(RuntimeError), waiting(console, "starting Ray"):
        raise RuntimeError
