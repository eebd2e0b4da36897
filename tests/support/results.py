"""Results by image, made up: of a classifier with so many right answers, and of a detector that misses some objects."""

from __future__ import annotations

from typing import Any

import numpy as np

from spikefleet.tasks.coco_metrics import FoundBoxes
from spikefleet.tasks.per_image import Answers, Boxes, PerImage
from spikefleet_pipelines.store.annotations import Annotations

NAMES = ("a", "b", "c")
CATEGORIES = (1, 5, 9)


def with_classes(images: int, right: int, shift: int = 0, **changes: Any) -> PerImage:
    """Answers for `images` images of ten classes, of which `right` are right, from image `shift` on."""
    target = np.arange(images, dtype=np.int32) % 10
    is_right = np.roll(np.arange(images) < right, shift)
    predicted = np.where(is_right, target, (target + 1) % 10).astype(np.int32)
    results = Answers(predicted, target, np.full(images, 0.5, np.float32))
    given: dict[str, Any] = {"data_hash": "d" * 64, "split": "test", "rows": np.arange(images)}
    return PerImage(results, **{**given, **changes})


def detected(seed: int, missed: float = 0.3, noise: float = 0.0, images: int = 40) -> PerImage:
    """Detections with misses and false ones; objects are the same for every seed, and one of nine is a crowd."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(0)
    found, targets = [], []
    for image in range(images):
        count = 0 if image == 3 else int(truth.integers(1, 6))
        corners, sizes = truth.uniform(0, 60, (count, 2)), truth.uniform(8, 40, (count, 2))
        labels = truth.integers(0, len(NAMES), count)
        boxes = np.concatenate([corners, sizes], axis=1)
        targets.append(
            Annotations(
                image + 100,
                100,
                120,
                boxes,
                np.array(CATEGORIES)[labels],
                labels,
                np.arange(count) % 9 == 8,
                sizes.prod(axis=1),
                np.arange(count),
            )
        )
        kept = rng.random(count) > missed
        seen = np.concatenate([corners, corners + sizes], axis=1)[kept] + rng.normal(0, 2, (int(kept.sum()), 4))
        false = np.array([[10.0, 10.0, 22.0, 22.0]]) + rng.uniform(0, 50)
        order = np.concatenate([seen, false]).astype(np.float32).astype(np.float64) + noise
        scores = rng.permutation(np.linspace(0.1, 0.9, len(order))).astype(np.float32).astype(np.float64)
        found.append(FoundBoxes(order, scores, np.concatenate([labels[kept], [0]])))
    return PerImage(Boxes(found, targets), "d" * 64, "test", np.arange(images))
