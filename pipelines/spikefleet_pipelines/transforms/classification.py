"""Transform of rows of a classification split to a normalised batch.

Raw images are gathered, cropped and flipped as whole batches of uint8; encoded ones are decoded, cropped and resized
one by one, in as many threads as torch has (one in a loader process). Both end in the same float stage. Every random
number is a function of (seed, epoch, row, purpose); see `counter_random.py`. With `augment_on=device` raw images are
gathered alone, and `pixel_augmentation.py` does the rest with the same numbers.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from spikefleet_pipelines.counter_random import Draw, integers, uniform
from spikefleet_pipelines.store.rows import Rows
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.normalise import FloatStage, PixelScaling
from spikefleet_pipelines.transforms.pixel_augmentation import PixelAugmentation

Pixels = NDArray[np.uint8]
Packed = tuple[Tensor, PixelAugmentation | None]
"""Classes int64 [B] or float32 [B, K], and what is left to the device."""

_ATTEMPTS = 10
_RATIO = (3 / 4, 4 / 3)


class ClassificationTransform:
    """Images and their classes: a `BatchTransform` whose targets are int64 [B].

    Training with `mixup` or `cut_mix` has probabilities of the classes instead, float32 [B, K].

    Raises:
        ValueError: the config does not fit the images of the split.
    """

    def __init__(self, split: Rows, config: TransformConfig, train: bool, seed: int) -> None:
        self._images = ImageTransform(split, config, train, seed)
        self._split = split

    def __call__(self, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, Packed]:
        """Load rows; see `BatchTransform`."""
        images, config = self._images(rows, epoch), self._images.config
        if not self._images.train or config.mixup + config.cut_mix == 0:
            return images, (torch.from_numpy(self._split.labels[rows]), self._images.left_to_do(rows, epoch))
        from spikefleet_pipelines.transforms.mixing import mixed_batch

        return images, (mixed_batch(images, rows, epoch, self._images.seed, config, self._split, self._images), None)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the classes."""
        return packed[0]

    def send_pixels(self) -> PixelScaling | None:
        """See `SendsPixels`; with `augment_on=device` they are not augmented in training."""
        return self._images.send_pixels(augmented=False)

    def device_augmentation(self, packed: Packed) -> PixelAugmentation | None:
        """See `AugmentsOnDevice`."""
        return packed[1]


class ImageTransform:
    """Loads and transforms the images of one split: `transform(rows, epoch)` -> float32 [B, C, H, W].

    Raises:
        ValueError: the config does not fit the images of the split.
    """

    def __init__(self, split: Rows, config: TransformConfig, train: bool, seed: int) -> None:
        config.check_images(split.image_shape)
        self.split = split
        self.config = config
        self.train = train
        self.seed = seed
        self._normalise = FloatStage(config.normalise)
        self._unchanged = False
        self._pool: ThreadPoolExecutor | None = None
        if train and config.auto_augment != "none":
            # Late, because torchvision takes seconds to import; early enough for loader processes.
            from spikefleet_pipelines.transforms.auto_augment import auto_augment

            self._auto_augment = auto_augment

    def send_pixels(self, augmented: bool = True) -> PixelScaling | None:
        """See `SendsPixels`; normalised pixels are erased by cutout, and mixed.

        Args:
            augmented: false leaves to the caller what `left_to_do` returns, where the config has it done on the device.
        """
        mixed = self.config.mixup + self.config.cut_mix > 0
        self._unchanged = self.train and not augmented and not mixed and self.config.augments_on_device
        changed = mixed or (self.config.cutout and not self._unchanged)
        return None if self.train and changed else self._normalise.defer()

    def left_to_do(self, rows: NDArray[np.int64], epoch: int) -> PixelAugmentation | None:
        """What is left to do to the images of rows; None where they are augmented."""
        if not self._unchanged:
            return None
        assert self.split.image_shape is not None, "the config was checked"
        draws = [*self._shifts(rows, epoch), self._flips(rows, epoch)]
        if self.config.cutout:
            draws += [*self._erased(rows, epoch, *self.split.image_shape[1:])]
        numbers = np.stack(draws, axis=1, dtype=np.int32, casting="unsafe")
        return PixelAugmentation(torch.from_numpy(numbers), self.config.cutout)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def __call__(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Load rows [B] and transform them to float32 [B, C, H, W], normalised."""
        config = self.config
        if not self.train:
            return self._normalise(self._evaluation_images(rows))
        if self._unchanged:
            return self._normalise(self._stored(rows))
        images = self._cropped(rows, epoch, self._flips(rows, epoch))
        if config.auto_augment != "none":
            images = self._auto_augment(images, self.seed, epoch, rows)
        batch = self._normalise(images)
        if config.cutout:
            pixels = batch.numpy()
            pixels *= self._cutout_mask(rows, epoch, images.shape[-2], images.shape[-1])
        return batch

    def _cropped(self, rows: NDArray[np.int64], epoch: int, flips: NDArray[np.bool_]) -> Pixels:
        """Crop images, and flip some: each is written once into the batch."""
        side = self.config.random_resized_crop
        if side is not None:
            numbers = Draw.RESIZED_CROP + np.arange(4 * _ATTEMPTS)
            draws = uniform(self.seed, epoch, rows[:, None], numbers).reshape(-1, _ATTEMPTS, 4)

            def crop(image: Pixels, position: int) -> Pixels:
                top, left, height, width = resized_crop_box(
                    draws[position], image.shape[-2], image.shape[-1], self.config.random_resized_crop_scale
                )
                resized = resize(image[:, top : top + height, left : left + width], side, side)
                return resized[..., ::-1] if flips[position] else resized

            return self._each(rows, side, crop)
        return self._raw(rows, self._shifts(rows, epoch), flips)

    def _shifts(self, rows: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Draw how far crops are moved down and right, [2, B]."""
        padding, draws = self.config.crop_padding, np.array([[Draw.CROP_Y], [Draw.CROP_X]])
        return integers(self.seed, epoch, rows, draws, 2 * padding + 1) - padding

    def _flips(self, rows: NDArray[np.int64], epoch: int) -> NDArray[np.bool_]:
        if not self.config.horizontal_flip:
            return np.zeros(len(rows), np.bool_)
        return uniform(self.seed, epoch, rows, Draw.FLIP) < self.config.horizontal_flip

    def _erased(self, rows: NDArray[np.int64], epoch: int, height: int, width: int) -> NDArray[np.int64]:
        """Draw top and left of the squares of cutout, [2, B]."""
        sides = ((Draw.CUTOUT_Y, height), (Draw.CUTOUT_X, width))
        centres = [integers(self.seed, epoch, rows, draw, side) for draw, side in sides]
        return np.stack(centres) - self.config.cutout // 2

    def _evaluation_images(self, rows: NDArray[np.int64]) -> Pixels:
        shorter, side = self.config.resize, self.config.center_crop
        if shorter is None or side is None:
            return self._raw(rows, np.zeros((2, len(rows)), np.int64), np.zeros(len(rows), np.bool_))

        def crop(image: Pixels, position: int) -> Pixels:
            height, width = image.shape[-2:]
            if height <= width:
                height, width = shorter, int(shorter * width / height)
            else:
                height, width = int(shorter * height / width), shorter
            top, left = round((height - side) / 2), round((width - side) / 2)
            return resize(image, height, width)[:, top : top + side, left : left + side]

        return self._each(rows, side, crop)

    def _stored(self, rows: NDArray[np.int64]) -> Pixels:
        """Read raw images as they are, straight from the shard into the batch."""
        assert self.split.image_shape is not None, "the config was checked"
        batch = self._normalise.pixels((len(rows), *self.split.image_shape))
        if len(rows):
            np.concatenate(self.split.views(rows), out=batch.reshape(-1, *batch.shape[2:]))
        return batch

    def _raw(self, rows: NDArray[np.int64], shifts: NDArray[np.int64], flips: NDArray[np.bool_]) -> Pixels:
        """Read raw images, shifted [2, B] down and right, straight from the shard into the batch."""
        assert self.split.image_shape is not None, "the config was checked"
        batch = self._normalise.pixels((len(rows), *self.split.image_shape))
        which = zip(batch, self.split.views(rows), shifts.T.tolist(), flips.tolist(), strict=True)
        for target, image, (down, right), flip in which:
            shifted_crop(image, down, right, target[..., ::-1] if flip else target)
        return batch

    def _each(self, rows: NDArray[np.int64], side: int, crop: Callable[[Pixels, int], Pixels]) -> Pixels:
        """Read images one by one and collect the results of `crop(image, position in the batch)` in one batch."""
        channels = 3 if self.split.image_shape is None else self.split.image_shape[0]
        batch = self._normalise.pixels((len(rows), channels, side, side))

        def load(position: int) -> None:
            batch[position] = crop(self.split.image(int(rows[position])).numpy(), position)

        threads = torch.get_num_threads()
        if threads == 1:
            for position in range(len(rows)):
                load(position)
        else:
            self._pool = self._pool or ThreadPoolExecutor(threads, "decode")
            for _ in self._pool.map(load, range(len(rows))):
                pass
        return batch

    def _cutout_mask(self, rows: NDArray[np.int64], epoch: int, height: int, width: int) -> NDArray[np.bool_]:
        """Cutout (DeVries and Taylor, 2017): a square with its centre anywhere in the image, clipped at the border."""
        inside = []
        for start, length in zip(self._erased(rows, epoch, height, width)[..., None], (height, width), strict=True):
            position = np.arange(length)
            inside.append((position >= start) & (position < start + self.config.cutout))
        return ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


def shifted_crop(image: Pixels, down: int, right: int, out: Pixels) -> None:
    """Crop an image, surrounded by zeros, to its size, into `out`.

    Args:
        image: uint8 [C, H, W].
        down: top of the crop in the image; negative above it.
        right: left of the crop, likewise.
        out: uint8 [C, H, W].
    """
    height, width = image.shape[-2:]
    top, left = min(height, max(0, -down)), min(width, max(0, -right))
    bottom, end = max(top, height - max(0, down)), max(left, width - max(0, right))
    if down or right:
        out[...] = 0
    out[:, top:bottom, left:end] = image[:, top + down : bottom + down, left + right : end + right]


def resized_crop_box(
    draws: NDArray[np.float64], height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Choose the box of a random resized crop, as torchvision's RandomResizedCrop does.

    Args:
        draws: [10, 4] numbers in [0, 1): area, aspect ratio, top and left of each attempt.
        height: of the image.
        width: of the image.
        scale: smallest and largest fraction of the area.

    Returns:
        (top, left, height, width).
    """
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for area, ratio, top, left in draws.tolist():
        target = height * width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(low + ratio * (high - low))
        crop_width, crop_height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return int(top * (height - crop_height + 1)), int(left * (width - crop_width + 1)), crop_height, crop_width
    # No attempt fits: the largest centred box with an allowed aspect ratio.
    crop_width = min(width, round(height * _RATIO[1]))
    crop_height = min(height, round(width / _RATIO[0]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """Resize bilinearly with antialiasing: uint8 [C, h, w] -> [C, height, width]."""
    if image.shape[-2:] == (height, width):
        return image
    # Contiguous in the order [h, w, C] of decoded images: otherwise torch copies it, in threads that compete for cores.
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    if not pixels.flags.writeable:  # a grey image in its shard, of which torch warns
        pixels = pixels.copy()
    ordered = torch.from_numpy(pixels).permute(2, 0, 1)
    return interpolate(ordered[None], (height, width), mode="bilinear", antialias=True)[0].numpy()
