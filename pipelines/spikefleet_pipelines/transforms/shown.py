"""Batches as plots show them: what a network gets, before normalisation, as uint8 images."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.events.binning_config import Kind
from spikefleet_pipelines.events.event_images import coloured, polarity_counts, scale_of, strip
from spikefleet_pipelines.transforms.normalise_config import Normalisation


def shown_images(images: Tensor, normalise: Normalisation) -> list[Tensor]:
    """Return images [B, C, H, W] as uint8 [C, H, W] each."""
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (normalise.mean, normalise.std))
    return list(((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8))


def shown_strips(frames: Tensor, normalise: Normalisation, kind: Kind) -> list[Tensor]:
    """Draw frames [B, T, C, H, W] of a representation side by side over time, uint8 [3, H, T W + gaps] each."""
    return [torch.from_numpy(strip(polarity_counts(one, kind))) for one in _values(frames, normalise)]


def shown_sums(frames: Tensor, normalise: Normalisation, kind: Kind) -> list[Tensor]:
    """Draw the sum of frames [B, T, C, H, W] over time, uint8 [3, H, W] each."""
    sums = [polarity_counts(one, kind).sum(0) for one in _values(frames, normalise)]
    return [torch.from_numpy(coloured(one, scale_of(one))) for one in sums]


def _values(frames: Tensor, normalise: Normalisation) -> NDArray[np.float32]:
    mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (normalise.mean, normalise.std))
    values: NDArray[np.float32] = frames.cpu().numpy() * std + mean
    return values
