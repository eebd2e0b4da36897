"""Mean average precision on resampled images: matched once, accumulated for each resample.

COCO's evaluation matches boxes to objects image by image, which takes nearly all of its time and does not depend on the
other images. A resample that draws image i w_i times counts its matches w_i times. Copies of a match have equal scores,
and between them the curve of precision over recall has no point that its envelope shows, so the precision of weighted
counts is that of the drawn images themselves. (But for detections of one class that have equal scores within one image:
there the evaluation itself depends on their order, and copies may come in another one.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet.status import Count, uncounted
from spikefleet.tasks.coco_metrics import COCO_MAX_DETECTIONS, match_boxes

_RECALLS = np.linspace(0, 1, 101)
_ALL_AREAS = 0


@dataclass(frozen=True)
class _ClassMatches:
    """The detections of one class over all images, best first."""

    image: NDArray[np.int64]
    """Image of each detection, [D]."""
    hit: NDArray[np.bool_]
    """Whether it found an object, [IoU, D]."""
    counts: NDArray[np.bool_]
    """Whether it counts at all, [IoU, D]: not if it found a crowd."""
    objects: NDArray[np.int64]
    """Objects of the class in each image, [images]."""


class Matches:
    """The matches of one detector on some images.

    Args:
        annotations: as `coco_metrics.ground_truth` returns them.
        found: as `coco_metrics.results` returns them.
        max_detections: the best detections of a class in an image that count.
    """

    def __init__(self, annotations: Any, found: Sequence[Any], max_detections: int = COCO_MAX_DETECTIONS) -> None:
        evaluation = match_boxes(annotations, found, max_detections)
        self.images = len(evaluation.params.imgIds)
        areas = len(evaluation.params.areaRng)
        per_class = np.array(evaluation.evalImgs, dtype=object).reshape(-1, areas, self.images)[:, _ALL_AREAS]
        self._classes = [_class_matches(images, max_detections) for images in per_class]

    def mean_average_precision(self, weights: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Compute mAP at IoU 0.5 to 0.95 of each resample.

        Args:
            weights: how often each image is drawn, [resamples, images]; None: each once.

        Returns:
            mAP in [0, 1], [resamples]; NaN where no object is drawn.
        """
        return mean_over_classes(self.average_precisions(weights))

    def average_precisions(self, weights: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Compute the AP at IoU 0.5 to 0.95 of each class in each resample.

        Args:
            weights: as for `mean_average_precision`.

        Returns:
            AP in [0, 1], [classes, resamples]; NaN where no object of the class is drawn.
        """
        drawn = np.ones((1, self.images), np.int64) if weights is None else weights
        return np.stack([_average_precision(one, drawn) for one in self._classes])


def mean_over_classes(by_class: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mAP `[resamples]` of the AP of each class `[classes, resamples]`, without those that are NaN."""
    known = ~np.isnan(by_class)
    sums = np.where(known, by_class, 0.0).sum(0)
    return np.divide(sums, known.sum(0), out=np.full(by_class.shape[1], np.nan), where=known.any(0))


def resampled_gain(
    candidate: Matches, champion: Matches, resamples: int = 2_000, seed: int = 0, at_a_time: int = 50
) -> NDArray[np.float64]:
    """Paired bootstrap: mAP of the candidate minus that of the champion on the same resampled images, [resamples].

    Args and Raises as for `resampled_gains`.
    """
    return resampled_gains(candidate, champion, resamples, seed, at_a_time)[0]


def resampled_gains(
    candidate: Matches,
    champion: Matches,
    resamples: int = 2_000,
    seed: int = 0,
    at_a_time: int = 50,
    progress: Count = uncounted,
    drawn_together: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Paired bootstrap: what the candidate gains over the champion on the same resampled images.

    Args:
        candidate: matches on the images.
        champion: matches on the same images.
        resamples: number of resamples.
        seed: of the resamples.
        at_a_time: resamples that are computed together, for the memory of counts.
        progress: called with (resamples done, in all).
        drawn_together: number of the recording of each image, [images]: the label times of one are not independent,
            so recordings are drawn. None: images are.

    Returns:
        The gain in mAP, [resamples], and in the AP of each class, [classes, resamples]; NaN where nothing is drawn.

    Raises:
        ValueError: the two have different numbers of images.
    """
    if candidate.images != champion.images:
        raise ValueError(f"found matches on {candidate.images} and {champion.images} images, expected the same images")
    generator = np.random.default_rng(seed)
    if drawn_together is None:
        drawn_together = np.arange(candidate.images)
    _, unit = np.unique(drawn_together, return_inverse=True)
    units = int(unit.max(initial=-1)) + 1
    share = np.full(units, 1 / units)
    totals, by_class = [], []
    for start in range(0, resamples, at_a_time):
        weights = generator.multinomial(units, share, min(at_a_time, resamples - start))[:, unit]
        of_candidate, of_champion = candidate.average_precisions(weights), champion.average_precisions(weights)
        totals.append(mean_over_classes(of_candidate) - mean_over_classes(of_champion))
        by_class.append(of_candidate - of_champion)
        progress(min(start + at_a_time, resamples), resamples)
    return np.concatenate(totals), np.concatenate(by_class, axis=1)


def least_p(units: int) -> float:
    """The smallest p that a bootstrap over so many units can show: that of a sign test on which all of them agree.

    All resamples of one recording are that recording, so the share of resamples without a gain alone would be 0.

    Args:
        units: recordings, or images, that are drawn.
    """
    return 0.5**units


def _class_matches(images: Sequence[Any], most: int) -> _ClassMatches:
    """Joins COCOeval's results of one class; images without objects and detections of it have None."""
    objects = np.array([0 if one is None else int((np.asarray(one["gtIgnore"]) == 0).sum()) for one in images])
    there = [(position, one) for position, one in enumerate(images) if one is not None]
    scores = np.concatenate([np.zeros(0), *(one["dtScores"][:most] for _, one in there)])
    order = np.argsort(-scores, kind="mergesort")  # stable, as pycocotools sorts
    image = np.concatenate([np.zeros(0, np.int64), *(np.full(len(one["dtScores"][:most]), k) for k, one in there)])
    ious = len(there[0][1]["dtMatches"]) if there else 0
    matched = np.concatenate([np.zeros((ious, 0)), *(one["dtMatches"][:, :most] for _, one in there)], axis=1)
    ignored = np.concatenate([np.zeros((ious, 0)), *(one["dtIgnore"][:, :most] for _, one in there)], axis=1)
    counts = ~ignored.astype(bool)[:, order]
    return _ClassMatches(image[order], (matched[:, order] > 0) & counts, counts, objects)


def _average_precision(matches: _ClassMatches, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Average precision of one class over all IoUs, [resamples]; NaN without objects."""
    objects = weights @ matches.objects
    answer = np.full(len(weights), np.nan)
    known = objects > 0
    if not known.any():
        return answer
    drawn = weights[known][:, matches.image].astype(np.float64)
    total = np.zeros(int(known.sum()))
    for hit, counts in zip(matches.hit, matches.counts, strict=True):
        found = np.cumsum(drawn * hit, axis=1)
        recall = found / objects[known][:, None]
        precision = found / np.maximum(np.cumsum(drawn * counts, axis=1), np.finfo(float).eps)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for row in range(len(recall)):
            places = np.searchsorted(recall[row], _RECALLS, side="left")
            reached = places < recall.shape[1]
            total[row] += envelope[row][places[reached]].sum() / len(_RECALLS)
    answer[known] = total / max(len(matches.hit), 1)
    return answer
