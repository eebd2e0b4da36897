"""Pictures of a run: learning curves, confusion matrix, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_NAMED_CLASSES = 25
"""Beyond this many classes, names along the axes could not be read."""


def learning_curve(history: Sequence[Mapping[str, float]], metric: str, path: Path) -> None:
    """Loss of training, the validation metric and spike health over epochs; one row of `history` an epoch."""
    panels = (
        ("loss", ("train/loss",)),
        (metric, (f"train/{metric}", f"val/{metric}")),
        ("share of neurons", ("spikes/firing_rate", "spikes/dead_fraction", "spikes/saturated_fraction")),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.6), layout="constrained")
    for axis, (title, keys) in zip(axes, panels, strict=True):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in history if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=key)
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    _save(figure, path)


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Rows: the truth; columns: the prediction; colour: the share of the row. `counts` is `[K, K]`."""
    size = len(class_names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(2.5 + min(size, 40) * 0.42, 2 + min(size, 40) * 0.38), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    axis.set(xlabel="predicted", ylabel="true")
    if size <= _NAMED_CLASSES:
        axis.set_xticks(range(size), class_names, rotation=45, ha="right")
        axis.set_yticks(range(size), class_names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=7)
    _save(figure, path)


def picture_grid(images: Sequence[torch.Tensor], captions: Sequence[str], right: Sequence[bool], path: Path) -> None:
    """Pictures `[C, H, W]` (uint8) under their captions, green where right and red where wrong."""
    columns = min(8, max(1, len(captions)))
    rows = -(-len(captions) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.85 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption, correct in zip(axes.flat, images, captions, right, strict=False):
        pixels = image.permute(1, 2, 0).numpy()
        axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
        axis.set_title(caption, fontsize=8, color="#1a7f37" if correct else "#cf222e")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Writes a PNG under a temporary name and moves it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)
    partial.replace(path)
