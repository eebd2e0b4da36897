"""Two networks on the same images: which is better, and is that more than chance?

Right and wrong answers are compared by the exact test of McNemar, average precision by resampled images (paired
bootstrap). Both look at the stored results alone: nothing is predicted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spikefleet.data_summary import DataSummary
from spikefleet.gates.paired import ALPHA, PairedCounts, worse_classes
from spikefleet.status import Count, uncounted
from spikefleet.tasks.per_image import Answers, Boxes, PerImage
from spikefleet.tasks.resampled_map import Matches, resampled_gains

RESAMPLES = 1_000

_LEVEL = 0.95


@dataclass(frozen=True)
class PairedResult:
    """The second network against the first."""

    split: str
    metric: str
    images: int
    first: float
    second: float
    interval: tuple[float, float]
    """Of second - first, 95 %, by resampled images."""
    p_value: float
    """Chance of such a difference, in either direction, between networks that are equally good."""
    test: str
    """Name of the test."""
    lost: int | None = None
    """Right by the first alone; None for average precision."""
    gained: int | None = None
    """Right by the second alone."""
    worse: tuple[str, ...] = ()
    """Classes of which the second answers fewer right, by more than chance over all classes."""
    better: tuple[str, ...] = ()

    @property
    def gain(self) -> float:
        """Second - first."""
        return self.second - self.first

    @property
    def says(self) -> str:
        """The conclusion in words."""
        found = f"{self.split}/{self.metric} {self.first:.2%} and {self.second:.2%} on the same {self.images:,} images"
        low, high = self.interval
        shown = f"difference {self.gain:+.2%} ({_LEVEL:.0%} interval {low:+.2%} to {high:+.2%}), p = {self.p_value:.2g}"
        if self.p_value > ALPHA:
            verdict = "the images do not show which one is better"
        else:
            verdict = f"the {'second' if self.gain > 0 else 'first'} one is better by more than chance"
        return f"{verdict}: {found}, {shown} ({self.test})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "split": self.split,
            "metric": self.metric,
            "images": self.images,
            "first": self.first,
            "second": self.second,
            "difference": self.gain,
            "interval": list(self.interval),
            "level": _LEVEL,
            "p_value": self.p_value,
            "test": self.test,
            "lost": self.lost,
            "gained": self.gained,
            "worse_classes": list(self.worse),
            "better_classes": list(self.better),
        }


def unpaired(first: PerImage, second: PerImage) -> str | None:
    """Why two results cannot be compared image by image, in words; None if they can."""
    if type(first.results) is not type(second.results):
        return "one answers with classes, the other with boxes"
    if first.data_hash != second.data_hash:
        return (
            f"they were measured on different data (content hashes {first.data_hash[:12]} and {second.data_hash[:12]})"
        )
    if first.split != second.split:
        return f"they were measured on different splits, {first.split} and {second.split}"
    if not np.array_equal(first.rows, second.rows):
        return f"they were measured on different images ({len(first.rows)} and {len(second.rows)} of the split)"
    if not len(first.rows):
        return "they were measured on no image"
    left, right = first.results, second.results
    if isinstance(left, Answers) and isinstance(right, Answers) and not np.array_equal(left.target, right.target):
        return "their files disagree about the true classes"
    if isinstance(left, Boxes) and isinstance(right, Boxes):
        if left.max_detections != right.max_detections:
            return (
                f"detections of a class in an image counted up to {left.max_detections} and {right.max_detections} "
                "(evaluation.max_detections)"
            )
        if not _same_objects(left, right):
            return "their files disagree about the objects in the images"
        if all(one.crowd.all() for one in left.targets):
            return "no image has an object"
    return None


def compare_paired(
    first: PerImage,
    second: PerImage,
    data: DataSummary,
    resamples: int = RESAMPLES,
    progress: Count = uncounted,
) -> PairedResult:
    """Compares two results of which `unpaired` has nothing to say.

    Args:
        first: results of the first network.
        second: results of the second, on the same images.
        data: summary of the data, for the names of the classes.
        resamples: of the paired bootstrap.
        progress: called with (resamples done, in all).
    """
    left, right = first.results, second.results
    if isinstance(left, Answers) and isinstance(right, Answers):
        return _answers(first.split, left, right, data.class_names)
    assert isinstance(left, Boxes)
    assert isinstance(right, Boxes)
    return _boxes(first.split, left, right, data, resamples, progress)


def _answers(split: str, first: Answers, second: Answers, names: Sequence[str]) -> PairedResult:
    classes = first.target.astype(np.int64)
    counts = PairedCounts.of(second.right, first.right)
    worse = worse_classes(second.right, first.right, classes, most=0.0)
    better = worse_classes(first.right, second.right, classes, most=0.0)
    return PairedResult(
        split,
        "top1",
        counts.images,
        float(first.right.mean()),
        float(second.right.mean()),
        counts.interval(_LEVEL),
        min(1.0, 2 * min(counts.p_better, counts.p_worse)),
        "exact McNemar test, two-sided",
        counts.lost,
        counts.gained,
        tuple(_name(names, label) for label in worse),
        tuple(_name(names, label) for label in better),
    )


def _boxes(split: str, first: Boxes, second: Boxes, data: DataSummary, resamples: int, progress: Count) -> PairedResult:
    named = data.class_names, data.category_ids
    before, after = (Matches(*one.coco(*named), one.max_detections) for one in (first, second))
    gains, _ = resampled_gains(after, before, resamples, progress=progress)
    gains = gains[~np.isnan(gains)]
    low, high = np.quantile(gains, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    # Of equal detections every gain is 0, which is no evidence in either direction.
    tail = min(float((gains <= 0).mean()), float((gains >= 0).mean()))
    return PairedResult(
        split,
        "map50_95",
        before.images,
        float(before.mean_average_precision()[0]),
        float(after.mean_average_precision()[0]),
        (float(low), float(high)),
        min(1.0, max(2 * tail, 1 / len(gains))),
        f"paired bootstrap, {len(gains):,} resamples",
    )


def _same_objects(first: Boxes, second: Boxes) -> bool:
    left, right = first.arrays(), second.arrays()
    names = [name for name in left if name.startswith("object") or name in ("image_ids", "sizes")]
    return all(np.array_equal(left[name], right[name]) for name in names)


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else str(label)
