"""Augmentation of frames: sizes and bounds, equal to torchvision's, and a function of (seed, epoch, sample)."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine
from torchvision.transforms.functional import rotate as reference_rotate

from spikefleet_pipelines.events.augmentation import Sample
from spikefleet_pipelines.events.frame_augmentation import (
    cut_mix,
    cutout,
    draw_mix,
    mixed_classes,
    nda,
    roll,
    rotate,
    shear,
)
from spikefleet_pipelines.events.frame_augmentation_config import NDA_LIMITS, FrameAugmentation

SIDE = 48


@pytest.fixture
def frames() -> Tensor:
    """Different numbers in all pixels, from 1 on: [T, C, H, W]."""
    return torch.arange(1, 3 * 2 * SIDE * SIDE + 1, dtype=torch.float32).reshape(3, 2, SIDE, SIDE)


@pytest.mark.parametrize("degrees", [-30.0, -7.3, 0.0, 12.9, 30.0])
@pytest.mark.parametrize("size", [(48, 48), (17, 34)])
def test_rotation_and_shear_are_torchvisions(degrees: float, size: tuple[int, int]) -> None:
    frames = torch.randint(1, 50, (3, 2, *size), generator=torch.Generator().manual_seed(0)).float()
    nearest = InterpolationMode.NEAREST
    turned = reference_rotate(frames, degrees, nearest, fill=[0.0])
    assert (rotate(frames, degrees) == turned).float().mean() > 0.998  # float32 decides ties otherwise
    sheared = affine(frames, 0.0, [0, 0], 1.0, [degrees, 0.0], nearest, fill=[0.0])
    assert (shear(frames, degrees) == sheared).float().mean() > 0.998
    if degrees:
        assert (rotate(frames, -degrees) == turned).float().mean() < 0.8
        assert (shear(frames, -degrees) == sheared).float().mean() < 0.8
    else:
        assert torch.equal(rotate(frames, 0.0), frames)
        assert torch.equal(shear(frames, 0.0), frames)


def test_rotations_by_90_degrees_are_exact(frames: Tensor) -> None:
    assert torch.equal(rotate(frames, 90.0), frames.rot90(1, (-2, -1)))
    assert torch.equal(rotate(frames, 180.0), frames.flip(-1, -2))


def test_values_are_moved_and_never_mixed(frames: Tensor) -> None:
    for changed in (rotate(frames, 17.0), shear(frames, 25.0), roll(frames, (3, -4))):
        assert set(changed.unique().tolist()) <= {0.0, *frames.flatten().tolist()}
    assert torch.equal(roll(frames, (3, -4))[..., 3:, :-4], frames[..., :-3, 4:])
    assert torch.equal(roll(frames, (3, -4)).sort(-1).values.sum(), frames.sort(-1).values.sum())
    fill = torch.tensor([-1.0, -2.0]).reshape(2, 1, 1)
    corners = rotate(frames, 30.0, fill)[..., 0, 0]
    assert torch.equal(corners, torch.tensor([-1.0, -2.0]).expand(3, 2))


def which(frames: Tensor, changed: Tensor, largest: int) -> tuple[str, tuple[int, int] | None]:
    """The kind of a change of frames, and how far it rolled them."""
    for down in range(-largest, largest + 1):
        for right in range(-largest, largest + 1):
            if torch.equal(changed, frames.roll((down, right), (-2, -1))):
                return "roll", (down, right)
    middle = changed[0, 0, SIDE // 2 - 1 : SIDE // 2 + 1]  # a shear leaves the two rows at the centre in place
    return ("shear" if torch.equal(middle, frames[0, 0, SIDE // 2 - 1 : SIDE // 2 + 1]) else "rotate"), None


@pytest.mark.parametrize(("data_set", "largest"), [("dvs_cifar10", 5), ("ncaltech101", 3)])
def test_nda_is_exactly_one_of_three(frames: Tensor, data_set: str, largest: int) -> None:
    kinds: Counter[str] = Counter()
    ways: set[int] = set()
    for number in range(240):
        kind, by = which(frames, nda(frames, data_set, Sample(0, 0, number)), largest)
        kinds[kind] += 1
        ways |= set(by or ())
    assert ways == set(range(-largest, largest + 1))
    assert sum(kinds.values()) == 240
    assert all(60 <= kinds[kind] <= 100 for kind in ("roll", "rotate", "shear"))


def test_nda_has_the_limits_of_the_released_code() -> None:
    assert NDA_LIMITS["dvs_cifar10"] == (5 / 48, 30, 30)
    assert NDA_LIMITS["ncaltech101"] == (3 / 48, 15, 15)
    line = torch.zeros(1, 1, SIDE, SIDE)
    line[..., SIDE // 2] = 1
    for data_set, limit in (("dvs_cifar10", 30.0), ("ncaltech101", 15.0)):
        slopes = []
        for number in range(400):
            changed = nda(line, data_set, Sample(1, 2, number))[0, 0]
            low, high = (changed[row].nonzero() for row in (8, 40))
            if len(low) and len(high):
                slopes.append(abs(float(low.float().mean() - high.float().mean())) / 32)
        assert max(slopes) <= math.tan(math.radians(limit)) + 0.05
        assert max(slopes) > math.tan(math.radians(0.8 * limit))


def test_all_slices_and_channels_change_alike(frames: Tensor) -> None:
    same = frames[:1, :1].expand(3, 2, SIDE, SIDE)
    for changed in (nda(same, "dvs_cifar10", Sample(0, 0, 3)), cutout(same, 0.3, Sample(0, 0, 3))):
        assert not torch.equal(changed, same)
        assert torch.equal(changed, changed[:1, :1].expand_as(changed))


def test_what_is_random_is_a_function_of_seed_epoch_and_sample(frames: Tensor) -> None:
    base = Sample(3, 4, 5)
    for change in (
        lambda sample: nda(frames, "dvs_cifar10", sample),
        lambda sample: cutout(frames, 0.4, sample),
        lambda sample: torch.tensor(draw_mix(1.0, 1000, (SIDE, SIDE), sample)[1]),  # type: ignore[index]
    ):
        assert torch.equal(change(base), change(Sample(3, 4, 5)))
        others = [change(other) for other in (Sample(9, 4, 5), Sample(3, 9, 5), Sample(3, 4, 9))]
        assert not all(torch.equal(change(base), other) for other in others)
    before = frames.clone()
    cutout(frames, 0.4, base)
    nda(frames, "dvs_cifar10", base)
    assert torch.equal(frames, before)


def test_cutout_is_a_square_in_the_frame(frames: Tensor) -> None:
    areas = []
    for number in range(200):
        gone = cutout(frames, 0.25, Sample(0, 0, number)) == 0
        rows, columns = gone[0, 0].any(1).nonzero().flatten(), gone[0, 0].any(0).nonzero().flatten()
        assert int(rows.max() - rows.min()) + 1 == len(rows) <= 12
        assert int(columns.max() - columns.min()) + 1 == len(columns) <= 12
        assert int(gone.sum()) == 6 * len(rows) * len(columns)
        areas.append(len(rows) * len(columns))
    assert max(areas) == 144
    assert 36 <= min(areas) < 72  # at a corner a quarter is left
    assert torch.equal(cutout(frames, 0.0, Sample(0, 0, 0)), frames)


def test_mixes_have_uniform_areas_and_partners_of_the_split() -> None:
    mixes = [draw_mix(1.0, 7, (30, 40), Sample(0, 1, number)) for number in range(2000)]
    found = [mix for mix in mixes if mix is not None]
    assert len(found) == 2000
    assert {mix.partner for mix in found} == set(range(7))
    for mix in found:
        top, left, height, width = mix.area
        assert 0 <= top <= top + height <= 30
        assert 0 <= left <= left + width <= 40
        assert mix.share == height * width / 1200
    whole = [mix for mix in found if 0 < mix.area[0] < 30 - mix.area[2] and 0 < mix.area[1] < 40 - mix.area[3]]
    assert all(abs(mix.area[2] / 30 - mix.area[3] / 40) < 1 / 30 for mix in whole)  # of the frame's proportions
    # Of a rectangle of uniform share s around a uniform centre, the mean of (sqrt(s) - s / 4) ** 2 is inside.
    assert np.mean([mix.share for mix in found]) == pytest.approx(0.5 - 0.2 + 1 / 48, abs=0.03)
    kept = [draw_mix(0.25, 7, (30, 40), Sample(0, 1, number)) for number in range(2000)]
    assert 0.7 < np.mean([mix is None for mix in kept]) < 0.8
    assert draw_mix(0.0, 7, (30, 40), Sample(0, 1, 0)) is None


def test_a_mix_replaces_the_area_in_all_slices(frames: Tensor) -> None:
    other = -frames
    mixed = cut_mix(frames, other, (5, 7, 10, 20))
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[5:15, 7:27] = True
    assert torch.equal(mixed[..., inside], other[..., inside])
    assert torch.equal(mixed[..., ~inside], frames[..., ~inside])
    assert torch.equal(cut_mix(frames, other, (5, 7, 0, 20)), frames)
    with pytest.raises(ValueError, match=r"frames are \[3, 2, 48, 48\] and \[2, 2, 48, 48\], expected equal shapes"):
        cut_mix(frames, other[:2], (0, 0, 1, 1))


def test_classes_are_mixed_by_the_share() -> None:
    labels, partners = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 2])
    mixed = mixed_classes(labels, partners, torch.tensor([0.25, 0.5, 0.0]), 4)
    assert torch.equal(mixed, torch.tensor([[0.75, 0.25, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy
    own, other = loss(logits[:1], labels[:1]), loss(logits[:1], partners[:1])
    assert torch.isclose(loss(logits[:1], mixed[:1]), 0.75 * own + 0.25 * other)


def test_the_config_refuses_what_is_unknown() -> None:
    assert FrameAugmentation().is_none
    assert not FrameAugmentation(cut_mix=0.5).is_none
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        FrameAugmentation(cutout=1.5)
    with pytest.raises(ValidationError, match="'dvs_cifar10' or 'ncaltech101'"):
        FrameAugmentation(nda="cifar10")  # type: ignore[arg-type]
