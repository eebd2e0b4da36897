"""Trains a recipe under several settings from the same seeds, and compares the test metric in pairs of equal seeds.

    python tests/bench/compare_settings.py RECIPE 'NAME: KEY=VALUE ...' 'NAME: ...' [--all KEY=VALUE ...] [--seeds N]
        [--processes N] [--gpu] [--stores DIR] [--out FILE]

Each training runs in this machine's processes, one thread each, by the training core itself; with --gpu all of them
share the first CUDA device. Prints each result, then for each setting the mean, its standard deviation, and the mean
difference to the first setting with a 95 % interval (paired by seed, Student's t), and the smallest difference that 3,
5 and 10 seeds show four times in five: measure that first where a scale is to tell settings apart. With --out, results
are appended to a JSON-lines file, and those that it holds are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_access import open_data
from spikefleet.reproduction.paired_seeds import PairedSeeds, smallest_effect
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train

SEEDS = (3, 5, 10)
"""For how many seeds the smallest difference is said."""


class Job(NamedTuple):
    """One training."""

    recipe: str
    name: str
    overrides: tuple[str, ...]
    seed: int
    stores: Path
    gpu: bool = False


def in_this_process(gpu: bool) -> tuple[str, ...]:
    """Overrides of every training, which are no part of its settings."""
    return "cluster.workers=0", f"cluster.gpu={str(gpu).lower()}"


def train_one(job: Job) -> dict[str, Any]:
    """Trains, and returns the metrics of the best and of the last checkpoint."""
    torch.set_num_threads(1)
    seed = f"train.seed={job.seed}"
    config = load_config(job.recipe, parse_overrides([*job.overrides, seed, *in_this_process(job.gpu)]))
    store = open_data(config.data, job.stores, Console(quiet=True))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(config, store, Path(folder), ProcessGroup.single(job.gpu), NullSink())
    return {
        "recipe": job.recipe,
        "name": job.name,
        "overrides": list(job.overrides),
        "seed": job.seed,
        "device": torch.cuda.get_device_name() if job.gpu else "cpu",
        "test": dict(outcome.test),
        "validation": dict(outcome.validation),
        "history": [dict(epoch) for epoch in outcome.history],
        "seconds": time.monotonic() - began,
    }


def compare(rows: list[dict[str, Any]], names: list[str], metric: str) -> None:
    """Prints the settings' means, their paired differences to the first, and what more seeds would show."""
    found = {name: {row["seed"]: 100 * row["test"][metric] for row in rows if row["name"] == name} for name in names}
    first = found[names[0]]
    width = max(map(len, names))
    for name, by_seed in found.items():
        values = list(by_seed.values())
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        line = f"{name:<{width}}  {statistics.fmean(values):6.2f} ± {spread:5.2f} %  (n={len(values)})"
        # Seeds of one setting are taken as independent of another's, which is the larger spread of a difference.
        spread_of_difference: float | None = spread * math.sqrt(2)
        paired = PairedSeeds.of(by_seed, first)
        if name != names[0] and paired is not None:
            spread_of_difference = paired.deviation
            if paired.interval is not None:
                half = (paired.interval[1] - paired.interval[0]) / 2
                line += f"  difference {paired.difference:+6.2f} ± {half:.2f} points, p = {paired.p_value:.2g}"
        if spread_of_difference:
            shown = ", ".join(f"{smallest_effect(spread_of_difference, seeds):.2f}" for seeds in SEEDS)
            line += f"; shown by {', '.join(map(str, SEEDS))} seeds: {shown} points"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="+", metavar="NAME: KEY=VALUE ...")
    parser.add_argument("--all", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of all settings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--metric", default="top1")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="train on the CUDA device")
    parser.add_argument("--stores", type=Path, default=Path("stores"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    settings = {
        name.strip(): tuple(words.split()) for name, _, words in (text.partition(":") for text in given.settings)
    }
    common = tuple(given.all)
    jobs = [
        Job(given.recipe, name, (*common, *overrides), seed, given.stores, given.gpu)
        for seed in range(given.seeds)
        for name, overrides in settings.items()
    ]
    known = (
        [json.loads(line) for line in given.out.read_text().splitlines()] if given.out and given.out.exists() else []
    )
    done = {(row["recipe"], tuple(row["overrides"]), row["seed"]): row for row in known}
    rows = [
        {**done[job.recipe, job.overrides, job.seed], "name": job.name}
        for job in jobs
        if (job.recipe, job.overrides, job.seed) in done
    ]
    waiting = [job for job in jobs if (job.recipe, job.overrides, job.seed) not in done]
    config = load_config(given.recipe, parse_overrides([*common, *in_this_process(given.gpu)]))
    open_data(config.data, given.stores, Console(quiet=True))  # once, not by several processes at a time
    with ProcessPoolExecutor(given.processes) as pool:
        for future in as_completed([pool.submit(train_one, job) for job in waiting]):
            row = future.result()
            rows.append(row)
            print(
                f"{row['name']}, seed {row['seed']}: {100 * row['test'][given.metric]:.2f} % in {row['seconds']:.0f} s",
                flush=True,
            )
            if given.out:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                with given.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    compare(rows, list(settings), given.metric)


if __name__ == "__main__":
    main()
