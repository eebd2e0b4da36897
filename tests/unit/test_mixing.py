"""Mixed images: each as its numbers say, in any batch and process; labels are shares, and evaluation is not mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import beta, kstest

from spikefleet_pipelines.counter_random import Draw, integers, uniform
from spikefleet_pipelines.events.augmentation import Sample
from spikefleet_pipelines.events.frame_augmentation import cut_mix, draw_mix
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan
from spikefleet_pipelines.store.reader import Split, Store
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.mixing import beta_shares

SEED, EPOCH = 7, 2
BOTH: dict[str, Any] = {"mixup": 0.4, "mixup_alpha": 0.4, "cut_mix": 0.4, "crop_padding": 1}


@pytest.fixture(scope="module")
def split(stores_dir: Path) -> Split:
    found = Store.open(stores_dir / "digits").samples("test")
    assert isinstance(found, Split)
    return found


def loaded(split: Split, train: bool = True, size: int = 64, processes: int = 0, **fields: Any) -> Batch:
    """All samples in the order of the split, in batches of a size."""
    loader = BatchLoader(split, TransformConfig(**fields), train, seed=SEED, processes=processes)
    batches = list(loader.epoch(EvaluationPlan(samples=len(split), global_batch=size), epoch=EPOCH))
    images, targets, rows = (
        torch.cat(list(part))  # type: ignore[arg-type]
        for part in zip(*[(one.images, one.targets, one.indices) for one in batches], strict=True)
    )
    return Batch(images, targets, rows, len(split))


def test_every_image_is_mixed_as_its_numbers_say(split: Split) -> None:
    mixed, plain = loaded(split, **BOTH), loaded(split, crop_padding=1)
    rows, count = np.arange(len(split)), {"mixup": 0, "cut_mix": 0, "none": 0}
    chance = uniform(SEED, EPOCH, rows, Draw.MIX)
    shares = beta.ppf(uniform(SEED, EPOCH, rows, Draw.MIX_SHARE), 0.4, 0.4)
    partners = integers(SEED, EPOCH, rows, Draw.MIX_PARTNER, len(split))
    for row in rows.tolist():
        image, label = plain.images[row], torch.zeros(10)
        own, share = int(split.labels[row]), 0.0
        other = own
        if chance[row] < 0.4:
            count["mixup"] += 1
            partner, share = int(partners[row]), float(shares[row])
            image, other = (1 - share) * image + share * plain.images[partner], int(split.labels[partner])
        elif chance[row] < 0.8:
            count["cut_mix"] += 1
            mix = draw_mix(1.0, len(split), (8, 8), Sample(SEED, EPOCH, row))
            assert mix is not None
            image = cut_mix(image, plain.images[mix.partner], mix.area)
            other, share = int(split.labels[mix.partner]), mix.share
        else:
            count["none"] += 1
        label[own] += 1 - share
        label[other] += share
        assert torch.allclose(mixed.images[row], image, atol=1e-5)
        assert torch.allclose(mixed.targets[row], label, atol=1e-5)  # type: ignore[arg-type]
    assert min(count.values()) > len(split) // 8


def test_batches_processes_and_evaluation(split: Split) -> None:
    whole = loaded(split, **BOTH)
    for other in (loaded(split, size=17, **BOTH), loaded(split, processes=2, **BOTH)):
        assert torch.equal(other.images, whole.images)
        assert torch.equal(other.targets, whole.targets)  # type: ignore[arg-type]
    for unmixed in (loaded(split, train=False, **BOTH), loaded(split, crop_padding=1)):
        assert isinstance(unmixed.targets, torch.Tensor)
        assert unmixed.targets.dtype == torch.int64
        assert unmixed.targets.tolist() == split.labels.tolist()
    assert not torch.equal(loaded(split, crop_padding=1).images, whole.images)


def test_shares_are_from_a_beta_distribution() -> None:
    numbers = uniform(1, 0, np.arange(4000), Draw.MIX_SHARE)
    assert kstest(beta_shares(numbers, 0.2), beta(0.2, 0.2).cdf).pvalue > 0.01
    assert kstest(beta_shares(numbers, 0.2), beta(0.5, 0.5).cdf).pvalue < 1e-6


def test_probabilities_are_of_one_choice() -> None:
    with pytest.raises(ValidationError, match=r"mixup is 0\.7 and cut_mix is 0\.5, of which an image gets one; set"):
        TransformConfig(mixup=0.7, cut_mix=0.5)
