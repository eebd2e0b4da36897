"""Trainings whose figures are not looked at: drawing them takes longer than a small training itself."""

from __future__ import annotations

import inspect
from typing import Any

from spikefleet import plots

DRAWN = [
    name
    for name, function in inspect.getmembers(plots, inspect.isfunction)
    if not name.startswith("_")
    and function.__module__ == plots.__name__
    and "path" in inspect.signature(function).parameters
]
"""Functions that draw a file."""


def nothing(*arguments: Any, **settings: Any) -> None:
    """Stands for each of them."""


def draw_nothing() -> None:
    """For a process that ends with the test; elsewhere, the fixture `no_figures`."""
    for name in DRAWN:
        setattr(plots, name, nothing)
