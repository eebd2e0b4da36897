"""Pixels of a detector's training batches that are padding, with and without grouping by aspect ratio.

    python tests/bench/bench_padding.py [--annotations instances_train2017.json] [--workers 8] [--batch 16]

Sizes are those of a file in COCO's format; without one 20,000 sizes are drawn from the most frequent ones of COCO
2017, in about their shares. Nothing is decoded: the sizes of resized images and of the batches follow from them. The
settings are those of coco_retinanet_sg_resnet18: shorter side 800, longer side at most 1333, multiples of 32.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.sampling import EpochPlan, TrainingRows
from spikefleet_pipelines.sources.coco_json import read_coco_json

# Width, height and share of about 118,000 images; the rest varies.
FREQUENT = [
    (640, 480, 0.37),
    (640, 427, 0.16),
    (640, 426, 0.09),
    (480, 640, 0.13),
    (427, 640, 0.06),
    (500, 375, 0.05),
    (426, 640, 0.03),
    (640, 425, 0.03),
    (640, 360, 0.03),
    (500, 333, 0.02),
    (640, 640, 0.02),
    (375, 500, 0.01),
]
SIZE, LONGEST, DIVISOR = 800, 1333, 32


def drawn_sizes(count: int) -> NDArray[np.int64]:
    """Height and width, [n, 2]."""
    rng = np.random.default_rng(0)
    shares = np.array([share for _, _, share in FREQUENT])
    chosen = rng.choice(len(FREQUENT), count, p=shares / shares.sum())
    return np.array([(height, width) for width, height, _ in FREQUENT])[chosen]


def resized(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    ratio = np.minimum(SIZE / sizes.min(1), LONGEST / sizes.max(1))
    return np.maximum(1, np.rint(sizes * ratio[:, None])).astype(np.int64)


def padding(sizes: NDArray[np.int64], training: TrainingRows, workers: int, batch: int) -> float:
    """Share of all pixels of an epoch's batches that lie outside the images."""
    shown, pixels = 0, 0
    for rank in range(workers):
        plan = EpochPlan(samples=len(sizes), global_batch=batch, world_size=workers, rank=rank, training=training)
        for part in plan.batches(0):
            own = sizes[part.indices]
            height, width = -(-own.max(0) // DIVISOR) * DIVISOR
            shown += int(own.prod(1).sum())
            pixels += int(height * width * len(own))
    return 1 - shown / pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    if given.annotations is None:
        sizes = drawn_sizes(20_000)
    else:
        columns = read_coco_json(given.annotations).columns
        sizes = np.stack([columns.heights, columns.widths], axis=1).astype(np.int64)
    groups = (sizes[:, 1] > sizes[:, 0]).astype(np.int64)
    on_input = resized(sizes)
    share = given.batch // given.workers
    print(f"{len(sizes)} images, {groups.mean():.1%} wide; {share} images on each of {given.workers} workers")
    for name, training in (("any order", TrainingRows()), ("grouped by aspect", TrainingRows(None, groups))):
        print(f"{name}: {padding(on_input, training, given.workers, given.batch):.1%} of the pixels are padding")


if __name__ == "__main__":
    main()
