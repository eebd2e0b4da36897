"""How long a training step waits for its batch: the step is replaced by a sleep of the length that it has on a GPU.

    python tests/bench/bench_starvation.py [--step-ms 128] [--batch 64] [--processes 0 1 2] [--steps 60]

JPEGs of 500x375 (as in `bench_loading.py`) to 224, as pixels, as a GPU is sent them. For each number of loader
processes: the images/s that they give to a reader that does nothing else, and beside a step the share of the time for
which steps waited, the longest wait, and the bytes of images that were copied between processes. The first batch of an
epoch, for which nothing was asked in advance, is given apart. A step sleeps, so the processor time is all the loader's,
as where a GPU computes.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.bench_loading import write_jpegs
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import StepBatch
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Split
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.normalise_config import NORMALISATIONS


@dataclass(frozen=True)
class LongEpoch:
    """A plan of so many steps, over few images again and again."""

    samples: int
    steps_per_epoch: int
    batch: int

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """Iterates over the batches from `start_step` on."""
        for step in range(start_step, self.steps_per_epoch):
            rows = np.arange(step * self.batch, (step + 1) * self.batch, dtype=np.int64) % self.samples
            yield StepBatch(step, rows, self.batch)


def waits(loader: BatchLoader, plan: LongEpoch, epoch: int, step_s: float) -> list[float]:
    """Seconds for which each step of an epoch waited."""
    waited, start = [], time.perf_counter()
    for batch in loader.epoch(plan, epoch):
        waited.append(time.perf_counter() - start)
        assert len(batch.images) == plan.batch
        time.sleep(step_s)
        start = time.perf_counter()
    return waited


def measure(split: Split, processes: int, options: argparse.Namespace) -> str:
    config = TransformConfig(
        random_resized_crop=224,
        horizontal_flip=0.5,
        resize=256,
        center_crop=224,
        normalise=NORMALISATIONS["imagenet"],
    )
    loader = BatchLoader(split, config, train=True, processes=processes, pixels=True)
    filled = 4 + 2 * processes  # steps until a loader process has what it keeps in advance
    plan = LongEpoch(len(split), filled + options.steps, options.batch)
    waits(loader, plan, 0, 0.0)  # loader processes start
    rate = options.steps * options.batch / sum(waits(loader, plan, 1, 0.0)[filled:])
    first, *waited = waits(loader, plan, 2, options.step_ms / 1000)
    waited = waited[filled - 1 :]
    share = sum(waited) / (sum(waited) + options.steps * options.step_ms / 1000)
    return (
        f"processes {processes}: gives {rate:7,.0f} images/s   a step waits {share:6.1%} of the time, "
        f"at most {1000 * max(waited):6.1f} ms, {1000 * first:6.1f} ms for the first   "
        f"copied {loader.copied_bytes:,} bytes"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--step-ms", type=float, default=128.0, help="length of a step")
    arguments.add_argument("--batch", type=int, default=64, help="images of a step")
    arguments.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2], help="numbers of loader processes")
    arguments.add_argument("--steps", type=int, default=60, help="steps that are measured")
    options = arguments.parse_args()
    needed = 1000 * options.batch / options.step_ms
    print(f"{options.batch} images a step of {options.step_ms:g} ms: {needed:,.0f} images/s; {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_jpegs(root / "jpeg", 640)
        split = prepare("image_folder", root / "jpeg", root / "store", parallel=1).split("train")
        for processes in options.processes:
            print(measure(split, processes, options), flush=True)


if __name__ == "__main__":
    main()
