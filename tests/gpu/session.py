"""Sections with a time budget each, whose results and failures go into one JSON file as they come."""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

Results = dict[str, Any]


class OutOfTime(BaseException):  # a section that records failures must not record this one
    """A section used its budget."""


@dataclass
class Session:
    """One run of the script: its file, its results so far, and the time that is left."""

    out: Path
    seconds: float
    dry: bool
    results: Results = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """The GPU; in dry mode the CPU."""
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def fused(self) -> str:
        """The form under test; the CPU has only the lean one."""
        return "lean" if self.dry else "triton"

    def left(self) -> float:
        """Seconds until the end of the whole run."""
        return self.seconds - (time.monotonic() - self.begun)

    def write(self) -> None:
        """Writes the file atomically, so that a run that is cut off leaves what was measured."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_name(f".{self.out.name}.partial")
        partial.write_text(json.dumps(self.results, indent=1, default=str) + "\n")
        partial.replace(self.out)

    def section(self, name: str, budget: float, work: Callable[[Session, Results], None], reserve: float = 0.0) -> None:
        """Runs one section; what it put into its results stays, also where it fails or is out of time.

        Args:
            name: of its results.
            budget: seconds that it may take.
            work: fills the results.
            reserve: seconds that later sections need.
        """
        results: Results = {}
        self.results[name] = results
        allowed = min(budget * (6 if self.dry else 1), self.left() - reserve)
        begun = time.monotonic()
        print(f"== {name}: up to {allowed:.0f} s, {self.left():.0f} s left", flush=True)
        if allowed <= 1:
            results["skipped"] = "no time was left"
        else:
            try:
                with _limited(allowed):
                    work(self, results)
            except OutOfTime:
                results["out_of_time"] = f"after {allowed:.0f} s"
            except Exception:
                results["failure"] = traceback.format_exc()
                print(results["failure"], file=sys.stderr, flush=True)
        results["seconds"] = round(time.monotonic() - begun, 1)
        self.write()
        print(json.dumps(results, default=str)[:3000], flush=True)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in this thread when the time is over."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
