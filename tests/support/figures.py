"""Trainings whose figures are not looked at: drawing them takes longer than a small training itself."""

from __future__ import annotations

import base64
import inspect
from collections.abc import Callable
from pathlib import Path
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


_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
"""A PNG of one pixel."""


def blank(name: str) -> Callable[..., None]:
    """Stands for one of them where the file must be there."""
    signature = inspect.signature(getattr(plots, name))

    def write(*arguments: Any, **settings: Any) -> None:
        path = Path(signature.bind(*arguments, **settings).arguments["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_PIXEL)

    return write


def draw_nothing() -> None:
    """For a process that ends with the test; elsewhere, the fixture `no_figures`."""
    for name in DRAWN:
        setattr(plots, name, nothing)
