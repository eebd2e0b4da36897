"""Numbers of workers: one, or a range in which every size divides the global batch."""

from __future__ import annotations

from typing import Any

import pytest

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.worker_count import nearest_batches, parse_worker_count
from spikefleet.errors import UserError


@pytest.mark.parametrize(
    ("given", "count"),
    [("2", 2), (0, 0), ("1:3", (1, 3)), (" 2:8 ", (2, 8)), ([1, 2], (1, 2)), ((1, 100_000), (1, 100_000))],
)
def test_a_number_or_a_range_is_read(given: Any, count: int | tuple[int, int]) -> None:
    assert parse_worker_count(given) == count


@pytest.mark.parametrize(
    "given", ["3:1", "2:2", "0:2", "1:", "a:b", [1], [1, 2, 3], [True, 2], True, -1, 100_001, "1:100001"]
)
def test_anything_else_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_worker_count(given)


def test_the_nearest_batches_are_those_that_every_size_divides() -> None:
    for least in range(1, 5):
        for most in range(least, 6):
            for accumulate in (1, 2, 3):

                def divides(batch: int, sizes: range = range(least, most + 1), parts: int = accumulate) -> bool:
                    return all(batch % (size * parts) == 0 for size in sizes)

                for batch in range(1, 70):
                    below = next((size for size in range(batch, 0, -1) if divides(size)), None)
                    above = next(size for size in range(batch, 1000) if divides(size))
                    expected = [batch] if divides(batch) else [size for size in (below, above) if size]
                    assert nearest_batches(batch, least, most, accumulate) == expected, (batch, least, most, accumulate)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            "train.global_batch=64 cluster.workers=1:3",
            "64 cannot be divided by 1 to 3 workers x 1 micro-batch; set it to 60 or 66",
        ),
        ("train.global_batch=64 cluster.workers=1:3 train.accumulate=2", "x 2 micro-batches; set it to 60 or 72"),
        ("train.global_batch=4 cluster.workers=1:4", "set it to 12"),
        ("train.global_batch=64 cluster.workers=1:99", "set a narrower range of cluster.workers"),
    ],
)
def test_a_batch_that_a_size_does_not_divide_is_refused_with_the_nearest(overrides: str, sentence: str) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch") as refused:
        load_config("digits", parse_overrides(overrides.split()))
    assert sentence in str(refused.value)


def test_the_range_is_part_of_the_digest() -> None:
    counts = ("1", "1:2", "2", "1:3")
    digests = {
        load_config("digits", parse_overrides(["train.global_batch=66", f"cluster.workers={count}"])).digest()
        for count in counts
    }
    assert len(digests) == len(counts)
