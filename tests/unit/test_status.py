"""Signs of life: what is waited for is named in time, and not too often."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from spikefleet import status
from spikefleet.status import PlainLines, Waiting, counting, waiting


def console_of(terminal: bool) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=terminal, width=100, color_system=None), written


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is 20 times as fast, and no line printed before."""
    for name in ("_LIVE_AFTER_S", "_PLAIN_AFTER_S", "_LOOK_EVERY_S"):
        monkeypatch.setattr(status, name, getattr(status, name) / 20)
    monkeypatch.setattr(status, "PLAIN_LINES", PlainLines(every_s=0.75))


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
def test_plain_lines_come_at_most_one_in_their_interval() -> None:
    console, written = console_of(terminal=False)
    lines = PlainLines(every_s=0.75)
    waits = Waiting(console, lines)
    began = time.monotonic()
    for what in ("proof", "energy", "plots"):
        waits.announce(what)
        time.sleep(0.5)
    waits.close()
    most = 1 + int((time.monotonic() - began) / 0.75)
    said = written.getvalue().splitlines()
    assert 1 <= len(said) <= most
    assert said[0].startswith("proof: ")


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
