"""An exported file against the network on the images of a split.

fp32 rounds, and where a membrane is next to its threshold another order of a sum makes another spike, which moves an
output by far more than rounding does. So an image on which a file differs is looked at once more in fp64, where file
and network must be equal: then rounding was the reason, else the file is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet.errors import RunError
from spikefleet.export.pixels import ImagesToCompare
from spikefleet.export.recorded import Recorded
from spikefleet.status import Count, uncounted

LIMIT = 1e-4
"""Largest difference of an output in fp32."""
FP64_LIMIT = 1e-6
"""Largest difference of an output in fp64."""
_LOOKED_AT_AGAIN = 16
"""Images on which a file differs, at most, that are compared in fp64: the reference evaluator is slow."""

Run = Callable[[NDArray[np.uint8]], Sequence[Tensor]]
"""uint8 images [B, C, H, W] -> outputs [B, ...]."""


Recording = Callable[[NDArray[np.uint8]], Recorded]
"""uint8 images [B, C, H, W] -> outputs and spikes."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison found."""

    split: str
    images: int
    max_difference: float
    """Of an output, over the images on which rounding flips no spike."""
    same_class: int | None = None
    """Images with the same largest logit; None for a detector."""
    flipped_images: int = 0
    """On which rounding flips a spike: file and network differ in fp32, and are equal in fp64."""
    flipped_in_fp64: int = 0
    """Of these, so many were compared in fp64."""
    max_difference_of_flipped: float = 0.0
    max_difference_in_fp64: float = 0.0
    spikes: int | None = None
    """Spikes compared one by one, all equal; None where a file shows none."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def sentence(self) -> str:
        """What was found, in words."""
        says = f"compared on {self.images} {self.split} images: largest difference {self.max_difference:.2g}"
        if self.spikes is not None:
            says += f", all {self.spikes:,} spikes are equal"
        if self.same_class is not None:
            says += f", same class on {self.same_class}"
        if self.flipped_images:
            says += (
                f"; rounding flips a spike on {self.flipped_images} of them (difference up to "
                f"{self.max_difference_of_flipped:.2g} in fp32; {self.flipped_in_fp64} compared in fp64, up to "
                f"{self.max_difference_in_fp64:.2g})"
            )
        return says


@dataclass
class _Differing:
    """An image on which file and network differ in fp32."""

    difference: float
    pixels: NDArray[np.uint8]


@torch.inference_mode()
def compare_outputs(
    file: Run,
    network: Run,
    images: ImagesToCompare,
    exact: Callable[[], tuple[Run, Run]],
    progress: Count = uncounted,
) -> Comparison:
    """Compares a file in fp32 with the network in fp32; where they differ, both in fp64.

    Args:
        file: runs the file.
        network: runs the network.
        images: to compare on.
        exact: file and network in fp64; called where it is needed.
        progress: called with (images compared, images in all).

    Raises:
        RunError: the file is not the network.
    """
    done, same, largest = 0, 0, 0.0
    classified: bool | None = None
    differing: list[_Differing] = []
    for pixels in images:
        found, expected = file(pixels), network(pixels)
        gaps = differences(found, expected)
        agree = torch.ones(len(pixels), dtype=torch.bool)
        classified = len(expected) == 1 and expected[0].ndim == 2
        if classified:
            agree = found[0].argmax(1) == expected[0].argmax(1)
        for row, (gap, equal) in enumerate(zip(gaps.tolist(), agree.tolist(), strict=True)):
            if gap <= LIMIT and equal:
                largest = max(largest, gap)
            else:
                differing.append(_Differing(gap, pixels[row : row + 1]))
        same += int(agree.sum())
        done += len(pixels)
        progress(done, images.count)
    if not done:
        raise RunError(_nothing(images))
    differing.sort(key=lambda one: -one.difference)
    again = differing[:_LOOKED_AT_AGAIN]
    in_fp64 = _largest_in_fp64(again, exact, done) if again else 0.0
    return Comparison(
        split=images.split,
        images=done,
        max_difference=largest,
        same_class=same if classified else None,
        flipped_images=len(differing),
        flipped_in_fp64=len(again),
        max_difference_of_flipped=again[0].difference if again else 0.0,
        max_difference_in_fp64=in_fp64,
    )


def _largest_in_fp64(differing: Sequence[_Differing], exact: Callable[[], tuple[Run, Run]], images: int) -> float:
    file, network = exact()
    largest = 0.0
    for one in differing:
        gap = differences(file(one.pixels), network(one.pixels)).max().item()
        if not gap <= FP64_LIMIT:
            raise RunError(
                f"the file does not compute what the network does: outputs differ by {one.difference:.3g} in fp32 "
                f"(at most {LIMIT:g} is allowed) and by {gap:.3g} in fp64, so rounding is not the reason; nothing is "
                f"written ({len(differing)} or more of {images} images differ)"
            )
        largest = max(largest, gap)
    return largest


@torch.inference_mode()
def compare_spikes(
    file: Recording,
    folded: Recording,
    network: Run,
    images: ImagesToCompare,
    progress: Count = uncounted,
    most_at_once: int = 16,
) -> Comparison:
    """Compares every spike of a file, in fp64, with those of the folded network, and its outputs with both.

    Args:
        file: runs the file.
        folded: runs the network that was written, in fp64.
        network: runs the trained network in fp32, whose answers are counted: folding may flip a spike.
        images: to compare on.
        progress: called with (images compared, images in all).
        most_at_once: images.

    Raises:
        RunError: a spike differs, or an output by more than the limit.
    """
    done, same, spikes, largest = 0, 0, 0, 0.0
    classified = False
    for batch in images:
        for start in range(0, len(batch), most_at_once):
            pixels = batch[start : start + most_at_once]
            (found, fired), (expected, wanted) = file(pixels), folded(pixels)
            if fired.keys() != wanted.keys():
                name = min(fired.keys() ^ wanted.keys())
                raise RunError(f"node {name} is in only one of file and network; nothing is written")
            for name, one in fired.items():
                if not torch.equal(one, wanted[name]):
                    count = int((one != wanted[name]).sum()) if one.shape == wanted[name].shape else one.numel()
                    raise RunError(
                        f"node {name} fires otherwise than the network: {count:,} of {one.numel():,} spikes differ; "
                        "nothing is written"
                    )
                spikes += one.numel()
            gap = differences(found, expected).max().item()
            if not gap <= LIMIT:
                raise RunError(
                    f"outputs differ from the network's by {gap:.3g}, at most {LIMIT:g} is allowed; nothing is written"
                )
            largest = max(largest, gap)
            trained = network(pixels)
            classified = len(trained) == 1 and trained[0].ndim == 2
            if classified:
                same += int((found[0].argmax(1) == trained[0].argmax(1)).sum())
            done += len(pixels)
            progress(done, images.count)
    if not done:
        raise RunError(_nothing(images))
    return Comparison(images.split, done, largest, same_class=same if classified else None, spikes=spikes)


def _nothing(images: ImagesToCompare) -> str:
    _, height, width = images.shape
    return f"no {images.split} image has the size {height}x{width}, so nothing is compared"


def differences(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """The largest difference of each image, [B]; infinite where shapes or numbers of outputs differ or a NaN is.

    Args:
        found: outputs [B, ...].
        expected: outputs [B, ...].
    """
    if [one.shape for one in found] != [other.shape for other in expected]:
        return torch.full((len(expected[0]),), float("inf"))
    gaps = [(one - other).abs().flatten(1).amax(1) for one, other in zip(found, expected, strict=True)]
    return torch.stack(gaps).amax(0).nan_to_num(float("inf"), float("inf"))
