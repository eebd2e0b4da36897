"""A network on its device: images in batches, large ones in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel

from spikefleet.errors import UserError
from spikefleet.inference.image_input import Pixels
from spikefleet.inference.tiles import Tiling, cut_out, merge_tiles
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.training.distributed import pick_device
from spikefleet.training.precision import autocast
from spikefleet_pipelines.in_memory import image_batch, resized, with_channels
from spikefleet_pipelines.loading import Batch


class Predictor:
    """A network on its device: RGB or grey pixels -> the pixels that it was given, and its prediction.

    Args:
        trained: the network.
        gpu: run on the GPU.
        score: smallest score of an object.
        batch: the most images, or tiles, that the network sees at once; those of one size after its transform.
        tiling: division of large images; None: images are seen whole.

    Raises:
        UserError: there is no GPU, or tiles are asked for and the network finds no boxes.
    """

    def __init__(
        self,
        trained: TrainedNetwork,
        *,
        gpu: bool = False,
        score: float = 0.3,
        batch: int = 1,
        tiling: Tiling | None = None,
    ) -> None:
        self._task, self._score, self.batch = trained.task, score, batch
        if tiling is not None and not self._task.finds_boxes:
            raise UserError(f"--tile merges the boxes of tiles, and {trained.reference} finds none; leave it out")
        self._device = pick_device(gpu)
        self._network = trained.network.to(self._device)
        self._transform, self._precision = trained.config.transform, trained.config.train.precision
        self._channels = trained.config.model.in_channels
        self._size = self._task.input_size(trained.data)
        self._tiling, self._iou = tiling, 0.0 if tiling is None else overlap_threshold(trained)

    def __call__(self, images: Sequence[Pixels]) -> list[tuple[Pixels, Any]]:
        """Predicts images, in their order; with a prediction's objects below the score left out."""
        shown = [resized(with_channels(image, self._channels), self._size) for image in images]
        windows = [self._windows(pixels) for pixels in shown]
        parts = [cut_out(pixels, window) for pixels, own in zip(shown, windows, strict=True) for window in own]
        found = iter(self._predict(parts))
        predictions = []
        for pixels, own in zip(shown, windows, strict=True):
            of_image = [next(found) for _ in own]
            _, height, width = pixels.shape
            whole = of_image[0] if len(own) == 1 else merge_tiles(own, of_image, (height, width), self._iou)
            predictions.append((pixels, whole))
        return predictions

    def _windows(self, pixels: Pixels) -> list[tuple[int, int, int, int]]:
        _, height, width = pixels.shape
        return [(0, 0, width, height)] if self._tiling is None else self._tiling.windows(height, width)

    def _predict(self, images: Sequence[Pixels]) -> list[Any]:
        """One prediction for each image; images are batched where the network sees them in one size."""
        waiting: dict[torch.Size, list[tuple[int, Batch]]] = {}
        predictions: list[Any] = [None] * len(images)
        for place, image in enumerate(images):
            single = image_batch(image[None], self._transform, self._channels)
            of_size = waiting.setdefault(single.images.shape, [])
            of_size.append((place, single))
            if len(of_size) == self.batch:
                self._run(waiting.pop(single.images.shape), predictions)
        for of_size in waiting.values():
            self._run(of_size, predictions)
        return predictions

    def _run(self, placed: Sequence[tuple[int, Batch]], predictions: list[Any]) -> None:
        batch = _joined([single for _, single in placed]).to(self._device)
        with autocast(self._precision, self._device):
            found = self._task.predict(self._network, batch)
        for (place, _), prediction in zip(placed, found, strict=True):
            predictions[place] = self._task.confident(prediction, self._score)


def _joined(singles: Sequence[Batch]) -> Batch:
    if len(singles) == 1:
        return singles[0]
    given = [single.targets for single in singles]
    targets: Any = (
        torch.cat([one for one in given if isinstance(one, torch.Tensor)])
        if isinstance(given[0], torch.Tensor)
        else tuple(target for one in given for target in one)
    )
    return Batch(torch.cat([single.images for single in singles]), targets, torch.arange(len(singles)), len(singles))


def overlap_threshold(trained: TrainedNetwork) -> float:
    """The overlap at which the network drops a worse box of the same class (`model.criterion.nms_iou`).

    Raises:
        UserError: its configuration has no such threshold.
    """
    value = getattr(_criterion(trained), "nms_iou", None)
    if not isinstance(value, float):
        raise UserError(
            f"{trained.reference} has no overlap threshold (model.criterion.nms_iou); leave out --nms and --tile"
        )
    return value


def with_overlap_threshold(trained: TrainedNetwork, iou: float) -> TrainedNetwork:
    """The network with another threshold of its non-maximum suppression. Raises UserError if it has none."""
    overlap_threshold(trained)
    criterion = _criterion(trained)
    assert criterion is not None, "it has a threshold"
    model = trained.config.model.model_copy(update={"criterion": criterion.model_copy(update={"nms_iou": iou})})
    return replace(trained, config=trained.config.model_copy(update={"model": model}))


def least_score(trained: TrainedNetwork) -> float:
    """The score below which the network itself drops boxes (`model.criterion.score_threshold`); 0 if there is none."""
    value = getattr(_criterion(trained), "score_threshold", 0.0)
    return value if isinstance(value, float) else 0.0


def _criterion(trained: TrainedNetwork) -> BaseModel | None:
    found = getattr(trained.config.model, "criterion", None)
    return found if isinstance(found, BaseModel) else None
