"""Charts of a page as inline SVG, and colours of tables: readable on a narrow screen, without outside requests."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment
from markupsafe import Markup

_WIDTH, _HEIGHT = 340, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 40

_FRAME = Environment(autoescape=True).from_string(
    """<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ label }}">
{% for y, text in ticks %}<line class="grid" x1="{{ left }}" x2="{{ right }}" y1="{{ y }}" y2="{{ y }}"/>
<text x="{{ left - 5 }}" y="{{ y + 4 }}" text-anchor="end">{{ text }}</text>
{% endfor %}{{ inside }}
{% for x, text in below %}<text x="{{ x }}" y="{{ bottom + 15 }}" text-anchor="middle">{{ text }}</text>
{% endfor %}<text x="{{ (left + right) / 2 }}" y="{{ bottom + 33 }}" text-anchor="middle">{{ name }}</text>
</svg>"""
)
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST_NAMED = 8


def share_line(values: Sequence[float], places: Sequence[str], name: str, label: str) -> Markup:
    """A line through shares.

    Args:
        values: in [0, 1], one for each place.
        places: their names, from left to right.
        name: of the axis below.
        label: of the chart, for those who do not see it.
    """
    xs = [_x((number + 0.5) / len(values)) for number in range(len(values))]
    ys = [_y(value) for value in values]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    dots = Markup("").join(
        Markup('<circle class="dot" cx="{}" cy="{}" r="3"/>').format(f"{x:.1f}", f"{y:.1f}")
        for x, y in zip(xs, ys, strict=True)
    )
    every = -(-len(places) // _MOST_NAMED)
    below = [(f"{x:.1f}", place) for x, place in zip(xs[::every], places[::every], strict=True)]
    return _frame(Markup('<polyline class="line" points="{}"/>').format(points) + dots, below, name, label)


def reliability(bins: Sequence[tuple[float, float, int]], name: str, label: str) -> Markup:
    """A reliability diagram: a bar of accuracy for each bin of confidence, and the line on which both are equal.

    Args:
        bins: (mean confidence, accuracy, number of answers) of each bin, in equal bins from 0 to 1.
        name: of the axis below.
        label: of the chart, for those who do not see it.
    """
    bars = Markup("").join(
        Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"/>').format(
            f"{_x(place / len(bins)) + 1:.1f}",
            f"{_y(accuracy):.1f}",
            f"{_x(1 / len(bins)) - _x(0) - 2:.1f}",
            f"{_y(0) - _y(accuracy):.1f}",
        )
        for place, (_, accuracy, count) in enumerate(bins)
        if count
    )
    diagonal = Markup('<line class="equal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(_x(0), _y(0), _x(1), _y(1))
    return _frame(bars + diagonal, [(f"{_x(tick):.1f}", f"{tick:g}") for tick in _TICKS], name, label)


def _frame(inside: Markup, below: Sequence[tuple[str, str]], name: str, label: str) -> Markup:
    text = _FRAME.render(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        bottom=_HEIGHT - _BOTTOM,
        ticks=[(_y(tick), f"{tick:.0%}") for tick in _TICKS],
        inside=inside,
        below=below,
        name=name,
        label=label,
    )
    return Markup(text)


def shade(share: float) -> str:
    """A CSS class of `page.html` for a share in [0, 1]: `s0`, the lightest, to `s10`."""
    return f"s{round(10 * min(max(share, 0.0), 1.0))}"


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)
