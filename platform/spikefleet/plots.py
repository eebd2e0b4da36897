"""Plots of a run: learning curves, confusion matrix, precision and recall, predictions. Every file is a PNG."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spikefleet.canvas import never_fatal, save, subplots
from spikefleet.plot_text import drawable, font_file

if TYPE_CHECKING:
    pass

_NAMED_CLASSES = 25
"""With more classes, their names on the axes would be too small to read."""

_NAME_WIDTH = 24
"""Characters of a file's name on a line below its image."""

_COLOURS = {True: "#1a7f37", False: "#cf222e", None: "black"}
"""Of a caption: right, wrong, and where there is nothing to compare with."""

_INPUTS = (
    ("spikes", "spikes in: additions", "#2a9d8f"),
    ("integers", "sums of spikes in: MACs", "#8e6bbf"),
    ("real", "real in: MACs", "#e76f51"),
)
"""What feeds a layer in a plot of energy, its label and colour."""

_SIDES = (("before", "#6c757d"), ("after", "#2a9d8f"))
"""Label and colour of what is compared."""

_UPRIGHT = 6
"""Characters of a name that has room below a bar."""

_READABLE_SIDE = 384
"""Images are enlarged by an integer factor to about this side in pixels before boxes are drawn on them."""


_STRIP_ASPECT = 3.0
"""Images so much wider than high are strips."""

_STRIP_COLUMNS = 16
"""Frames of strips side by side in a plot."""


@never_fatal
def learning_curve(history: Sequence[Mapping[str, float]], metric: str, path: Path) -> None:
    """Plots training loss, the validation metric and spike health over epochs.

    Args:
        history: metrics by name, one row per epoch.
        metric: name of the metric, without its split.
        path: the PNG.
    """
    panels = (
        ("loss", ("train/loss",)),
        (metric, (f"train/{metric}", f"val/{metric}")),
        ("spike health (fractions)", ("spikes/firing_rate", "spikes/dead_fraction", "spikes/saturated_fraction")),
    )
    figure, axes = subplots(1, len(panels), figsize=(13, 3.6), layout="constrained")
    for axis, (title, keys) in zip(axes, panels, strict=True):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in history if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=key)
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    save(figure, path)


@never_fatal
def confusion_matrix(counts: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Plots a confusion matrix; the colour is the fraction of the row.

    Args:
        counts: `[K, K]`, targets in rows, predictions in columns.
        class_names: of the K classes.
        path: the PNG.
    """
    size = len(class_names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axis = subplots(figsize=(2.5 + min(size, 40) * 0.42, 2 + min(size, 40) * 0.38), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="fraction of the target class", shrink=0.8)
    axis.set(xlabel="prediction", ylabel="target")
    if size <= _NAMED_CLASSES:
        names = list(map(drawable, class_names))
        axis.set_xticks(range(size), names, rotation=45, ha="right")
        axis.set_yticks(range(size), names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=7)
    save(figure, path)


@never_fatal
def image_grid(
    images: Sequence[torch.Tensor],
    captions: Sequence[str],
    correct: Sequence[bool | None],
    path: Path,
    names: Sequence[str] = (),
) -> None:
    """Plots images under their captions; wide ones, such as strips of events over time, in fewer columns.

    Args:
        images: uint8 `[C, H, W]` each.
        captions: one for each image.
        correct: whether the caption is green, else red; None: black, for there is nothing to compare with.
        path: the PNG.
        names: below the images, if there are any.
    """
    aspect = max((image.shape[-1] / image.shape[-2] for image in images), default=1.0)
    most, width_of_one = (8, 1.5) if aspect < _STRIP_ASPECT else (max(1, int(_STRIP_COLUMNS / aspect)), 1.5 * aspect)
    columns = min(most, max(1, len(captions)))
    rows = -(-len(captions) // columns)
    below = [textwrap.fill(drawable(name), _NAME_WIDTH) for name in names]
    height = 1.85 + 0.12 * max((text.count("\n") + 1 for text in below), default=0)
    width = max(width_of_one * columns, 2.2)  # one image alone is narrower than its caption
    figure, axes = subplots(rows, columns, figsize=(width, height * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption, is_correct in zip(axes.flat, images, captions, correct, strict=False):
        pixels = image.permute(1, 2, 0).numpy()
        axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
        axis.set_title(drawable(caption), fontsize=8, color=_COLOURS[is_correct])
    for axis, text in zip(axes.flat, below, strict=False):
        axis.text(0.5, -0.04, text, fontsize=6, ha="center", va="top", transform=axis.transAxes)
    save(figure, path)


@never_fatal
def image_sheet(images: Sequence[torch.Tensor], path: Path) -> None:
    """Plots images, uint8 `[3, H, W]` each, side by side."""
    columns = min(6, max(1, len(images)))
    rows = -(-len(images) // columns)
    figure, axes = subplots(rows, columns, figsize=(2.6 * columns, 2.6 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy())
    save(figure, path)


def boxes_on_image(
    image: torch.Tensor,
    boxes: torch.Tensor,
    labels: Sequence[int],
    captions: Sequence[str],
) -> torch.Tensor:
    """Draws captioned boxes on an image; a small image is enlarged so that captions are readable.

    Args:
        image: uint8 `[C, H, W]`.
        boxes: `[N, 4]`, x1 y1 x2 y2 in pixels of the image.
        labels: class of each box, which selects its colour.
        captions: text of each box.

    Returns:
        uint8 `[3, H', W']`.
    """
    from matplotlib import colormaps
    from torchvision.utils import draw_bounding_boxes  # seconds to import

    factor = max(1, _READABLE_SIDE // max(image.shape[-2:]))
    drawn = image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    if drawn.shape[0] == 1:
        drawn = drawn.expand(3, -1, -1)
    if len(boxes):
        palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
        colours = [tuple(round(255 * part) for part in palette[label % len(palette)]) for label in labels]
        size = max(14, max(drawn.shape[-2:]) // 18)
        try:
            font, shown = font_file(captions), list(map(drawable, captions))
            return draw_bounding_boxes(drawn, boxes * factor, shown, colours, False, 2, font, size)
        except (ValueError, RuntimeError, UnicodeError) as error:
            logging.getLogger(__name__).warning("captions of boxes cannot be drawn: %s", drawable(str(error)))
            return draw_bounding_boxes(drawn, boxes * factor, None, colours, False, 2)
    return drawn


@never_fatal
def precision_recall(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plots precision at IoU 0.5 over recall, one curve per class, and their mean.

    Args:
        curves: by class name, precision at evenly spaced recalls from 0 to 1.
        path: the PNG.
    """
    figure, axis = subplots(figsize=(6, 4.5), layout="constrained")
    for name, values in curves.items():
        # matplotlib leaves a label that starts with an underscore out of the legend.
        label = f" {drawable(name)}" if name.startswith("_") else drawable(name)
        axis.plot(np.linspace(0, 1, len(values)), values, lw=1, label=label if len(curves) <= _NAMED_CLASSES else None)
    mean = np.mean(list(curves.values()), axis=0)
    axis.plot(np.linspace(0, 1, len(mean)), mean, color="black", lw=2.5, label=f"mean, AP50 {mean.mean():.1%}")
    axis.set(xlabel="recall", ylabel="precision", title="IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower left")
    save(figure, path)


@never_fatal
def accuracy_over_time(accuracies: Sequence[float], step_ms: float | None, path: Path) -> None:
    """Plots the accuracy of the answer after each time step: how long a network must see to be right.

    Args:
        accuracies: in [0, 1], after each step.
        step_ms: length of a step; None where it is not the same for all samples.
        path: the PNG.
    """
    figure, axis = subplots(figsize=(5, 3.4), layout="constrained")
    times = [(step + 1) * (step_ms or 1) for step in range(len(accuracies))]
    axis.plot(times, accuracies, marker=".")
    axis.set(xlabel="time steps seen" if step_ms is None else "time seen (ms)", ylabel="top1", ylim=(0, 1))
    axis.grid(alpha=0.3)
    save(figure, path)


@never_fatal
def energy_bars(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Plots the energy of each layer in mJ, in network order: additions on spikes, MACs on integers and real values.

    Args:
        rows: `layer`, `input` ("spikes", "integers" or "real") and `energy_mj` of each layer.
        title: of the plot.
        path: the PNG.
    """
    shown = [row for row in rows if row["energy_mj"] > 0]
    figure, axis = subplots(figsize=(9, 1.5 + 0.2 * len(shown)), layout="constrained")
    for kind, label, colour in _INPUTS:
        places = [place for place, row in enumerate(shown) if row["input"] == kind]
        if places or kind != "integers":
            axis.barh(places, [shown[place]["energy_mj"] for place in places], color=colour, label=label)
    axis.set_yticks(range(len(shown)), [drawable(row["layer"]) for row in shown], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="mJ", title=drawable(title))
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)


@never_fatal
def gradient_flow(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Plots gradient norm, firing rate and relative step of each layer, in network order.

    Args:
        rows: `layer`, `gradient_norm`, `firing_rate` (None where a layer feeds no neurons) and `relative_step`.
        title: of the plot.
        path: the PNG.
    """
    panels = (
        ("gradient norm", "gradient_norm", "log"),
        ("firing rate", "firing_rate", "linear"),
        ("learning rate x gradient / weights", "relative_step", "log"),
    )
    width = 3 + 0.16 * len(rows)
    figure, axes = subplots(len(panels), 1, figsize=(width, 8), layout="constrained", sharex=True)
    for axis, (label, key, scale) in zip(axes, panels, strict=True):
        values = [np.nan if row[key] is None or (scale == "log" and row[key] <= 0) else row[key] for row in rows]
        axis.plot(range(len(rows)), values, marker=".", linestyle="none" if key == "firing_rate" else "-")
        axis.set_yscale(scale)
        axis.set_title(label, fontsize=9)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(0, 1)
    axes[2].axhline(1.0, color="#cf222e", lw=1, label="a step as large as the weights")
    axes[2].legend(fontsize=7)
    axes[2].set_xticks(range(len(rows)), [drawable(row["layer"]) for row in rows], rotation=90, fontsize=6)
    figure.suptitle(drawable(title), fontsize=9)
    save(figure, path)


@never_fatal
def rate_range(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggested: float,
    title: str,
    path: Path,
) -> None:
    """Plots the loss over a growing learning rate.

    Args:
        rates: of each step.
        losses: of each step.
        smoothed: their exponential mean.
        suggested: rate to mark.
        title: of the plot.
        path: the PNG.
    """
    figure, axis = subplots(1, 1, figsize=(7, 4), layout="constrained")
    axis.plot(rates, losses, color="#adb5bd", lw=1, label="loss of a step")
    axis.plot(rates, smoothed, color="#2a9d8f", label="smoothed")
    axis.axvline(suggested, color="#cf222e", lw=1, ls="--", label=f"steepest fall: {suggested:.3g}")
    axis.set_xscale("log")
    axis.set_ylim(0.9 * min(smoothed), 1.1 * max(smoothed[0], np.median(losses)))
    axis.set_xlabel("learning rate")
    axis.set_ylabel("training loss")
    axis.set_title(drawable(title), fontsize=9)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save(figure, path)


@never_fatal
def paper_and_ours(
    panels: Mapping[str, Sequence[tuple[str, float | None, float | None, float | None]]], title: str, path: Path
) -> None:
    """Plots results of a paper beside ours, one panel per metric.

    Args:
        panels: by axis label, rows of (name, the paper's value, our mean, our standard deviation).
        title: of the plot.
        path: the PNG.
    """
    rows = max(len(points) for points in panels.values())
    figure, axes = subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 1.5, 1.6 + 0.34 * rows), layout="constrained", squeeze=False
    )
    for axis, (label, points) in zip(axes.flat, panels.items(), strict=True):
        for place, (_, paper, mean, deviation) in enumerate(points):
            if paper is not None:
                axis.plot(paper, place, "D", color="#6c757d")
            if mean is not None:
                axis.errorbar(mean, place, xerr=deviation, fmt="o", color="#2a9d8f", capsize=3)
        axis.plot([], [], "D", color="#6c757d", label="paper")
        axis.errorbar([], [], fmt="o", color="#2a9d8f", label="ours: mean, standard deviation")
        axis.set_yticks(range(len(points)), [drawable(name) for name, *_ in points], fontsize=8)
        axis.margins(y=0.25)
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=5)
        axis.set(xlabel=label)
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(drawable(title), fontsize=10)
    save(figure, path)


@never_fatal
def data_overview(
    counts: Mapping[str, Sequence[int]], names: Sequence[str], sizes: Mapping[str, np.ndarray], path: Path
) -> None:
    """Plots class balance and sizes of a data set.

    Args:
        counts: for each split, the number of images or objects of each class.
        names: of the classes.
        sizes: under what they are sizes of, height and width in pixels, `[n, 2]`.
        path: the PNG.
    """
    figure, axes = subplots(1, 1 + len(sizes), figsize=(4.6 * (1 + len(sizes)), 4), layout="constrained", squeeze=False)
    balance, *others = axes.flat
    width = 0.8 / max(1, len(counts))
    for number, (split, values) in enumerate(counts.items()):
        balance.bar(np.arange(len(values)) + number * width, np.maximum(values, 0.5), width, label=split)
    balance.set(title="class balance", yscale="log", ylabel="number")
    if len(names) <= _NAMED_CLASSES:
        balance.set_xticks(np.arange(len(names)), [drawable(name) for name in names], rotation=90, fontsize=7)
    balance.legend(fontsize=8)
    for axis, (title, pixels) in zip(others, sizes.items(), strict=True):
        if len(pixels):
            axis.scatter(pixels[:, 1], pixels[:, 0], s=4, alpha=0.3)
        axis.set(title=title, xlabel="width (pixels)", ylabel="height (pixels)")
        axis.grid(alpha=0.3)
    save(figure, path)


@dataclass(frozen=True)
class BeforeAfter:
    """One panel of `before_and_after`; without places it says that there is nothing to compare."""

    title: str
    label: str
    """Of the values."""
    places: tuple[str, ...] | tuple[float, ...]
    """A name for each value: bars; or the edges of the bins of the values: histograms."""
    before: tuple[float, ...]
    after: tuple[float, ...]


@never_fatal
def before_and_after(panels: Sequence[BeforeAfter], title: str, path: Path) -> None:
    """Plots values before and after, one panel each, two in a row.

    Args:
        panels: what to compare.
        title: of the figure.
        path: the PNG.
    """
    rows = -(-len(panels) // 2)
    figure, axes = subplots(rows, 2, figsize=(13, 3.8 * rows), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.set_title(drawable(panel.title), fontsize=9)
        if panel.places:
            _draw_both(axis, panel)
        else:
            axis.text(0.5, 0.5, "not measured on both", ha="center", transform=axis.transAxes)
            axis.set(xticks=[], yticks=[])
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.suptitle(drawable(title), fontsize=10)
    keys = [axes[0, 0].fill_between([], [], color=colour, label=label) for label, colour in _SIDES]
    figure.legend(handles=keys, loc="outside upper right", ncols=2, fontsize=8)
    save(figure, path)


def _draw_both(axis: Any, panel: BeforeAfter) -> None:
    """Bars side by side, or histograms over one another."""
    names = [drawable(place) for place in panel.places if isinstance(place, str)]
    for values, (_, colour), shift in zip((panel.before, panel.after), _SIDES, (-0.2, 0.2), strict=True):
        if names:
            axis.bar(np.arange(len(values)) + shift, values, 0.4, color=colour)
        else:
            axis.stairs(values, panel.places, color=colour, fill=True, alpha=0.5)
    if names and len(names) <= _NAMED_CLASSES:
        turned = {"rotation": 45, "ha": "right"} if max(map(len, names)) > _UPRIGHT else {}
        axis.set_xticks(range(len(names)), names, fontsize=7, **turned)
    axis.set_ylabel(drawable(panel.label), fontsize=8)
    axis.grid(axis="y", alpha=0.3)
