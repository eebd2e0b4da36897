"""What every plot needs: a figure without a window, an atomic PNG, and that no training ends by its picture."""

from __future__ import annotations

import functools
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from spikefleet.plot_text import drawable, families
from spikefleet_tune.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Rest = ParamSpec("_Rest")


def never_fatal(draw: Callable[_Rest, None]) -> Callable[_Rest, bool]:
    """Makes a plot that fails a warning and an image that says so: a training of days does not end by its picture.

    A disk that is full is no failure of the plot, and raised. The plot returns whether it was drawn.
    """

    @functools.wraps(draw)
    def drawing(*arguments: _Rest.args, **named: _Rest.kwargs) -> bool:
        from matplotlib import rc_context

        texts = list(_texts((arguments, named)))
        try:
            with rc_context({"text.parse_math": False, "font.family": families(texts)}):
                draw(*arguments, **named)
        except OSError:
            raise
        except Exception as error:
            (path,) = (one for one in (*arguments, *named.values()) if isinstance(one, Path))
            reason = f"{type(error).__name__}: {error}"
            logging.getLogger(__name__).warning("plot %s cannot be drawn: %s", path, drawable(reason))
            _save_message(f"{draw.__name__} cannot be drawn: {reason}", path)
            return False
        return True

    return drawing


def _texts(value: Any) -> Iterator[str]:
    """All texts in the arguments of a plot."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _texts(key)
            yield from _texts(inside)
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from _texts(inside)
    elif is_dataclass(value):
        yield from _texts([getattr(value, field.name) for field in fields(value)])


def _save_message(text: str, path: Path) -> None:
    """Writes a PNG with a text."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (900, 120), "white")
    lines = textwrap.fill(text.encode("ascii", "backslashreplace").decode(), 130)
    ImageDraw.Draw(image).multiline_text((12, 12), lines, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        image.save(partial, format="png")


def subplots(rows: int = 1, columns: int = 1, **settings: Any) -> tuple[Figure, Any]:
    """A figure without a window, and its axes. Imports matplotlib here, because serving never plots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, **settings)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, atomically. Axes of powers have plain numbers: formulas are drawn as their text."""
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter

    class PlainLogFormatter(LogFormatter):
        """The ticks that `LogFormatter` labels, as plain numbers."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    for axis in (one for axes in figure.axes for one in (axes.xaxis, axes.yaxis)):
        if axis.get_scale() in ("log", "symlog"):
            axis.set_major_formatter("{x:g}")
        if axis.get_scale() == "log":
            axis.set_minor_formatter(PlainLogFormatter())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    pyplot.close(figure)
