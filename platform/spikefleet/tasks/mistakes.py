"""Which samples a network has most wrong, and what was taken for what; no request to a served network needs this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikefleet.tasks.coco_metrics import FoundBoxes, box_confusion
from spikefleet_pipelines.store.annotations import Annotations
from spikefleet_tune.messages import counted


@dataclass(frozen=True)
class Confusion:
    """How often what (rows) was taken for what (columns)."""

    names: tuple[str, ...]
    """Of the rows, and of the columns."""
    counts: NDArray[np.int64]
    """`[K, K]`."""
    says: str
    """What is counted."""


@dataclass(frozen=True)
class Mistake:
    """A sample that a network has wrong."""

    row: int
    """In the split."""
    says: str
    """What is wrong, in words."""


def wrong_answers(
    predicted: Sequence[int], probabilities: Sequence[float], targets: Sequence[int], names: Sequence[str], most: int
) -> list[Mistake]:
    """The samples whose class was answered wrongly, the surest answer first.

    Args:
        predicted: class that was answered, one for each sample.
        probabilities: of the answer.
        targets: true class.
        names: of the classes.
        most: number of samples, at most.
    """
    wrong = [row for row, (answer, target) in enumerate(zip(predicted, targets, strict=True)) if answer != target]
    wrong.sort(key=lambda row: -probabilities[row])
    return [
        Mistake(row, f"{names[predicted[row]]} {probabilities[row]:.1%}, is {names[targets[row]]}")
        for row in wrong[:most]
    ]


def worst_detections(
    found: Sequence[FoundBoxes], targets: Sequence[Annotations], classes: int, score: float, most: int
) -> list[Mistake]:
    """The images with most errors, the most first: objects missed or taken for another class, boxes on nothing.

    Args:
        found: detections of each image.
        targets: annotations of each image.
        classes: number K of classes.
        score: least score of a box that counts; boxes are matched at an IoU of 0.5.
        most: number of images, at most.
    """
    errors: list[tuple[int, Mistake]] = []
    for row, (one, target) in enumerate(zip(found, targets, strict=True)):
        counts = box_confusion([one.at_least(score)], [target], classes)
        missed, on_nothing = int(counts[:classes, classes].sum()), int(counts[classes, :classes].sum())
        other = int(counts[:classes, :classes].sum() - np.trace(counts[:classes, :classes]))
        if total := missed + on_nothing + other:
            objects = counted(int(counts[:classes].sum()), "object")
            parts = (
                f"{missed} of {objects} missed" if missed else "",
                f"{other} of {objects} with another class" if other else "",
                f"{counted(on_nothing, 'box', 'boxes')} on nothing" if on_nothing else "",
            )
            errors.append((total, Mistake(row, ", ".join(filter(None, parts)))))
    errors.sort(key=lambda one: -one[0])
    return [mistake for _, mistake in errors[:most]]
