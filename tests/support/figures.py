"""Trainings whose figures are not looked at: drawing them takes longer than a small training itself."""

from __future__ import annotations

from typing import Any

from spikefleet import plots

DRAWN = ("learning_curve", "confusion_matrix", "picture_grid", "picture_sheet", "precision_recall", "energy_bars")


def nothing(*arguments: Any) -> None:
    """Stands for each of the functions that draw."""


def draw_nothing() -> None:
    """For a process that ends with the test; elsewhere, the fixture `no_figures`."""
    for name in DRAWN:
        setattr(plots, name, nothing)
