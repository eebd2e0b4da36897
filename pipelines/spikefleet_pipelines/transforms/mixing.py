"""Mixing of images: mixup and CutMix, as functions of (seed, epoch, row).

* mixup: Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: beyond empirical risk minimization", ICLR 2018: an image becomes
  (1 - share) x + share x', and its label likewise, with share from Beta(alpha, alpha).
* CutMix: see `events/frame_augmentation.py`, whose rectangle and labels these are.

Deviation: the partner of an image is a random one of the split, not of the batch, so that it depends neither on the
number of workers nor on the size of the batch.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.counter_random import Draw, integers, uniform
from spikefleet_pipelines.events.augmentation import Sample
from spikefleet_pipelines.events.frame_augmentation import cut_mix, draw_mix, mixed_classes
from spikefleet_pipelines.store.rows import Rows
from spikefleet_pipelines.transforms.classification_config import TransformConfig

Load = Callable[[NDArray[np.int64], int], Tensor]
"""Loads rows of an epoch, augmented and normalised, float32 [B, C, H, W]."""


def mixed_batch(
    images: Tensor, rows: NDArray[np.int64], epoch: int, seed: int, config: TransformConfig, split: Rows, load: Load
) -> Tensor:
    """Mix images in place with others of their split.

    Args:
        images: of the rows, augmented and normalised, float32 [B, C, H, W].
        rows: positions in the split, [B].
        epoch: of training.
        seed: of the run.
        config: probabilities of mixup and of CutMix.
        split: with the labels.
        load: loads the partners.

    Returns:
        The probabilities of the classes, float32 [B, K].
    """
    partners, shares = np.array(rows), np.zeros(len(rows))
    chance = uniform(seed, epoch, rows, Draw.MIX)
    blended = chance < config.mixup
    partners[blended] = integers(seed, epoch, rows[blended], Draw.MIX_PARTNER, len(split))
    shares[blended] = beta_shares(uniform(seed, epoch, rows[blended], Draw.MIX_SHARE), config.mixup_alpha)
    areas = {}
    size = (images.shape[-2], images.shape[-1])
    for place in np.flatnonzero(~blended & (chance < config.mixup + config.cut_mix)).tolist():
        mix = draw_mix(1.0, len(split), size, Sample(seed, epoch, int(rows[place])))
        assert mix is not None, "its probability is 1"
        partners[place], shares[place], areas[place] = mix.partner, mix.share, mix.area
    changed = np.flatnonzero(shares > 0)
    others = load(partners[changed], epoch) if len(changed) else images[:0]
    for place, other in zip(changed.tolist(), others, strict=True):
        if place in areas:
            images[place] = cut_mix(images[place], other, areas[place])
        else:
            images[place].lerp_(other, float(shares[place]))
    own, theirs = (torch.from_numpy(split.labels[which]) for which in (rows, partners))
    return mixed_classes(own, theirs, torch.from_numpy(shares), len(split.class_names))


def beta_shares(numbers: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Turn uniform numbers into shares from Beta(alpha, alpha), by the inverse of its distribution function."""
    from scipy.special import betaincinv

    shares: NDArray[np.float64] = betaincinv(alpha, alpha, numbers)
    return shares
