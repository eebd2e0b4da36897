"""Steady-state step time of the training core in a Ray Train worker, against the same core without Ray.

Each round trains the same steps once in a fresh process without Ray and once in a Ray Train worker, one after the
other, with one thread each. The clock is read before each optimizer step, inside the training process.

    python tests/bench/bench_worker_loop.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from spikefleet.cluster.session import quiet_ray
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store

_WARM_UP = 20


def stopwatch(out: Path, steps: int) -> Callable[[ProcessGroup, int], None]:
    """Notes the time before each step, and writes the seconds between steps when the last one begins."""
    times: list[float] = []

    def note(group: ProcessGroup, step: int) -> None:
        times.append(time.perf_counter())
        if step == steps - 1:
            out.write_text(json.dumps([b - a for a, b in pairwise(times)]))

    return note


def without_ray(config: Config, store: Path, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    train(config, Store.open(store), folder, ProcessGroup.single(), NullSink(), stopwatch(folder / "times.json", steps))


def with_ray(config: Config, store: Path, folder: Path, steps: int) -> None:
    from spikefleet.cluster.ray_train import train_on_ray

    train_on_ray(config, Store.open(store), folder, NullSink(), before_step=stopwatch(folder / "times.json", steps))


def median_step(folder: Path) -> float:
    """Milliseconds; the steps of the warm-up and the ends of epochs (evaluation, checkpoint) stay out by the median."""
    return 1000 * statistics.median(json.loads((folder / "times.json").read_text())[_WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and epochs")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    quiet_ray()
    rounds, epochs = (2, 3) if options.quick else (5, 6)
    config = load_config(
        "digits", parse_overrides([f"train.epochs={epochs}", "checkpoint.every_epochs=100", "cluster.workers=1"])
    )
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        store = root / "digits"
        samples = len(prepare("digits", None, store).split("train"))
        steps = epochs * -(-samples // config.train.global_batch)
        for turn in range(rounds):
            folders = {name: root / f"{name}-{turn}" for name in ("plain", "ray")}
            for folder in folders.values():
                folder.mkdir()
            plain = multiprocessing.get_context("spawn").Process(
                target=without_ray, args=(config, store, folders["plain"], steps)
            )
            plain.start()
            plain.join()
            with_ray(config, store, folders["ray"], steps)
            pairs.append((median_step(folders["plain"]), median_step(folders["ray"])))
            print(
                f"round {turn + 1}/{rounds}: without Ray {pairs[-1][0]:.2f} ms, Ray Train {pairs[-1][1]:.2f} ms a step"
            )
    ratio = statistics.median(ray / plain for plain, ray in pairs)
    figures = {
        "steps_per_round": steps,
        "without_ray_ms": statistics.median(plain for plain, _ in pairs),
        "ray_train_ms": statistics.median(ray for _, ray in pairs),
        "ratio": ratio,
    }
    print(f"step under Ray Train / step without Ray: {ratio:.3f} (median of {rounds} rounds of {steps} steps)")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
