"""Plans: every sample once, the same on any world size, and the same tail after a resume."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikefleet_pipelines.counter_random import Draw, integers, random_bits, uniform
from spikefleet_pipelines.sampling import EpochPlan, EvaluationPlan, epoch_order


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(samples, global_batch, world_size, accumulate) that a plan takes."""
    world, accumulate = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    batch = world * accumulate * draw(st.integers(1, 8))
    least = min(2 * world * accumulate, batch)
    return draw(st.integers(least, least + 300)), batch, world, accumulate


def ranks(samples: int, batch: int, world: int, accumulate: int, seed: int, epoch: int) -> list[list[Any]]:
    return [
        list(
            EpochPlan(
                samples=samples, global_batch=batch, world_size=world, rank=rank, seed=seed, accumulate=accumulate
            ).batches(epoch)
        )
        for rank in range(world)
    ]


@settings(max_examples=150, deadline=None)
@given(shapes(), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_every_sample_exactly_once_and_no_rank_empty(shape: tuple[int, int, int, int], seed: int, epoch: int) -> None:
    samples, batch, world, accumulate = shape
    plans = ranks(*shape, seed, epoch)
    steps = EpochPlan(samples=samples, global_batch=batch, world_size=world, accumulate=accumulate).steps_per_epoch
    assert {len(plan) for plan in plans} == {steps}
    seen = np.concatenate([b.indices for plan in plans for b in plan])
    assert np.array_equal(np.sort(seen), np.arange(samples))
    for parts in zip(*plans, strict=True):
        sizes = [len(part.indices) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == parts[0].global_count == parts[-1].global_count
        # Each of the accumulated parts keeps two samples, unless the user's own batch gives it one.
        assert min(sizes) >= min(2 * accumulate, batch // world)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 50), st.integers(24, 400))
def test_global_batches_do_not_depend_on_world_size(seed: int, epoch: int, samples: int) -> None:
    def global_batches(world: int) -> list[list[int]]:
        return [
            np.concatenate([part.indices for part in parts]).tolist()
            for parts in zip(*ranks(samples, 24, world, 1, seed, epoch), strict=True)
        ]

    alone = global_batches(1)
    for world in (2, 3, 4):
        there = global_batches(world)
        # A remainder too small for a larger world is folded into the batch before it; the order stays.
        assert [i for b in there for i in b] == [i for b in alone for i in b]
        if samples % 24 == 0 or samples % 24 >= 8:
            assert there == alone


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 2**32), st.data())
def test_resuming_gives_the_same_tail(shape: tuple[int, int, int, int], seed: int, data: st.DataObject) -> None:
    samples, batch, world, accumulate = shape
    rank = data.draw(st.integers(0, world - 1))
    plan = EpochPlan(samples=samples, global_batch=batch, world_size=world, rank=rank, seed=seed, accumulate=accumulate)
    start = data.draw(st.integers(0, plan.steps_per_epoch))
    whole, tail = list(plan.batches(3)), list(plan.batches(3, start))
    assert [b.step for b in tail] == list(range(start, plan.steps_per_epoch))
    for expected, found in zip(whole[start:], tail, strict=True):
        assert np.array_equal(expected.indices, found.indices)
        assert expected.global_count == found.global_count


def test_order_changes_with_epoch_and_seed_and_is_pinned() -> None:
    assert not np.array_equal(epoch_order(100, 0, 0), epoch_order(100, 0, 1))
    assert not np.array_equal(epoch_order(100, 0, 0), epoch_order(100, 1, 0))
    # A changed order would silently change every run and every resume.
    assert epoch_order(10, 0, 0).tolist() == [8, 5, 0, 3, 7, 1, 2, 9, 6, 4]
    ordered = EpochPlan(samples=6, global_batch=3, shuffle=False)
    assert [b.indices.tolist() for b in ordered.batches(5)] == [[0, 1, 2], [3, 4, 5]]


def test_small_remainder_is_folded() -> None:
    plan = EpochPlan(samples=19, global_batch=8, world_size=2)  # remainder 3 < 2 * 2
    assert plan.steps_per_epoch == 2
    assert [b.global_count for b in plan.batches(0)] == [8, 11]
    kept = EpochPlan(samples=20, global_batch=8, world_size=2)
    assert [b.global_count for b in kept.batches(0)] == [8, 8, 4]
    assert EpochPlan(samples=5, global_batch=8, world_size=2).steps_per_epoch == 1


@settings(max_examples=80, deadline=None)
@given(shapes(), st.integers(0, 2**32))
def test_without_its_partial_batch_an_epoch_has_whole_ones(shape: tuple[int, int, int, int], seed: int) -> None:
    samples, batch, world, accumulate = shape
    fields = {"samples": samples, "global_batch": batch, "world_size": world, "accumulate": accumulate, "seed": seed}
    if samples < batch:
        with pytest.raises(ValueError, match="fewer than global_batch"):
            EpochPlan(**fields, drop_partial=True)
        return
    plans = [EpochPlan(**fields, rank=rank, drop_partial=True) for rank in range(world)]
    assert {plan.steps_per_epoch for plan in plans} == {samples // batch}
    assert plans[0].samples_per_epoch == samples // batch * batch
    parts = [list(plan.batches(0)) for plan in plans]
    assert {(part.global_count, len(part.indices)) for own in parts for part in own} == {(batch, batch // world)}
    seen = np.concatenate([part.indices for own in parts for part in own])
    assert len(np.unique(seen)) == len(seen) == plans[0].samples_per_epoch
    # The whole batches are those of a plan that keeps the rest; only that is gone.
    kept = EpochPlan(**fields, rank=0)
    assert kept.samples_per_epoch == samples
    for dropped, whole in zip(parts[0][:-1], kept.batches(0), strict=False):
        assert np.array_equal(dropped.indices, whole.indices)
    assert list(plans[0].batches(0, samples // batch)) == []


def test_other_samples_are_dropped_in_each_epoch() -> None:
    plan = EpochPlan(samples=100, global_batch=64, drop_partial=True)
    left = [set(range(100)) - set(next(iter(plan.batches(epoch))).indices.tolist()) for epoch in range(5)]
    assert {len(one) for one in left} == {36}
    assert len(set.union(*left)) > 80


def test_indivisible_batch_is_refused_with_nearest_values() -> None:
    with pytest.raises(
        ValueError, match=r"global_batch 100 .*world_size 3 x accumulate 4 = 12; set global_batch to 96 or 108"
    ):
        EpochPlan(samples=1000, global_batch=100, world_size=3, accumulate=4)
    with pytest.raises(ValueError, match="set global_batch to 8"):
        EpochPlan(samples=1000, global_batch=3, world_size=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"world_size": 2, "rank": 2}, "rank is 2"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"samples": 3, "world_size": 2}, "3 samples are too few"),
    ],
)
def test_bad_plans_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochPlan(**{"samples": 100, "global_batch": 8, **fields})


def test_start_step_outside_the_epoch_is_refused_at_once() -> None:
    plan = EpochPlan(samples=16, global_batch=8)
    assert list(plan.batches(0, 2)) == []
    with pytest.raises(ValueError, match="start_step is 3"):
        plan.batches(0, 3)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 9))
def test_evaluation_covers_everything_once_in_order(samples: int, batch: int, world: int) -> None:
    plans = [EvaluationPlan(samples=samples, global_batch=batch, world_size=world, rank=r) for r in range(world)]
    parts = [b for plan in plans for b in plan.batches()]
    assert all(len(b.indices) for b in parts)
    by_step: dict[int, list[Any]] = {}
    for part in parts:
        by_step.setdefault(part.step, []).append(part)
    assert [i for step in sorted(by_step) for p in by_step[step] for i in p.indices] == list(range(samples))
    for step_parts in by_step.values():
        sizes = [len(p.indices) for p in step_parts] + [0] * (world - len(step_parts))
        assert max(sizes) - min(sizes) <= 1
        assert {p.global_count for p in step_parts} == {sum(sizes)}


def test_draws_are_pure_uniform_and_independent() -> None:
    index = np.arange(200_000)
    flips = uniform(7, 3, index, Draw.FLIP)
    assert np.array_equal(flips[1000:1005], uniform(7, 3, index[1000:1005], Draw.FLIP))
    assert flips.min() >= 0
    assert flips.max() < 1
    histogram = np.histogram(flips, 20, (0, 1))[0]
    assert abs(histogram / 10_000 - 1).max() < 0.05
    for other in (uniform(7, 3, index, Draw.CROP_X), uniform(7, 4, index, Draw.FLIP), uniform(8, 3, index, Draw.FLIP)):
        assert abs(np.corrcoef(flips, other)[0, 1]) < 0.01
    assert abs(np.corrcoef(flips[:-1], flips[1:])[0, 1]) < 0.01
    assert set(integers(0, 0, index, Draw.CROP_Y, 9)) == set(range(9))
    assert len(np.unique(random_bits(0, 0, index, Draw.ORDER))) == len(index)


def test_draws_do_not_collide_and_old_ones_keep_their_numbers() -> None:
    old = ["ORDER", "HOLD_OUT", "CROP_Y", "CROP_X", "FLIP", "CUTOUT_Y", "CUTOUT_X", "POLICY", "POLICY_APPLY"]
    assert [Draw[name] for name in old] == list(range(9))
    assert (Draw.POLICY_SIGN, Draw.RESIZED_CROP) == (10, 64)
    taken = {"POLICY_APPLY": 2, "POLICY_SIGN": 2, "RESIZED_CROP": 40, "MOSAIC_CENTRE": 2, "MOSAIC_PARTNER": 3}
    taken |= {"TRANSLATE": 2, "HSV": 3, "SCENE": 1024, "EVENT_SCENE": 1024, "EVENT_PARTNERS": 1024}
    taken |= {"EVENT_AUGMENT": 64, "SLICE_ORDER": 1024, "SLICE_DELETION": 1024}
    numbers = [draw + k for draw in Draw for k in range(taken.get(draw.name, 1))]
    assert len(numbers) == len(set(numbers))
