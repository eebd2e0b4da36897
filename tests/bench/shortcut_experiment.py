"""What shortcut back-propagation does to a deep network: Spiking ResNet34 (post-addition, IF), narrow, on digits.

    python tests/bench/shortcut_experiment.py [--epochs N] [--seeds N] [--processes N] [--variants NAME ...] [--out DIR]

Trains it with and without side branches from the same seeds, by the training core itself.
Prints, and writes as JSON, the test accuracy of each seed, and the L2 norm of the first layer's gradient over all
steps; draws its histogram.
"""

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, StepDone
from spikefleet.training.loop import train
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store

NETWORK = ["model.stages=[3,4,6,3]", "model.width=0.25", "tracking.every_steps=1", "train.evaluate_every=4"]
PLAIN = ["model.connection=post_add"]
SUMMED = [*PLAIN, "shortcut.where=stage", "shortcut.loss=summed_logits"]
VARIANTS = {
    "plain": PLAIN,
    "shortcut, weight 1": [*SUMMED, "shortcut.schedule=constant", "shortcut.lambda0=1.0"],
    "evolutionary, 0.25 to 0": [*SUMMED, "shortcut.schedule=linear", "shortcut.lambda0=0.25"],
    "evolutionary, 1 to 0": [*SUMMED, "shortcut.schedule=linear", "shortcut.lambda0=1.0"],
}


class Job(NamedTuple):
    """One training."""

    variant: str
    seed: int
    epochs: int
    folder: str


class Norms:
    """Keeps the gradient norm of the first layer at each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.values.append(event.metrics["gradient/first_layer_norm"])


def run(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    settings = [*NETWORK, *VARIANTS[job.variant], f"train.epochs={job.epochs}", f"train.seed={job.seed}"]
    config = load_config("digits", parse_overrides([*settings, "cluster.workers=0"]))
    norms = Norms()
    store = Store.open(f"{job.folder}/digits")
    outcome = train(config, store, Path(job.folder) / f"{job.variant}-{job.seed}", ProcessGroup.single(), norms)
    steps = len(norms.values) // job.epochs
    return {
        "variant": job.variant,
        "seed": job.seed,
        "test_top1": outcome.test["top1"],
        "first_epoch_median": statistics.median(norms.values[:steps]),
        "norms": norms.values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, each with one thread")
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="all if not given"
    )
    parser.add_argument("--out", type=Path, help="folder for shortcut.json and shortcut.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        prepare("digits", None, Path(scratch) / "digits")
        jobs = [
            Job(variant, seed, arguments.epochs, scratch)
            for seed in range(arguments.seeds)
            for variant in arguments.variants
        ]
        rows = []
        with ProcessPoolExecutor(arguments.processes) as pool:
            for row in pool.map(run, jobs):
                rows.append(row)
                print(
                    f"seed {row['seed']}, {row['variant']}: test {row['test_top1']:.2%}, first layer's gradient: "
                    f"median {statistics.median(row['norms']):.3g}, in the first epoch {row['first_epoch_median']:.3g}",
                    flush=True,
                )
    for variant in arguments.variants:
        mine = [row for row in rows if row["variant"] == variant]
        top1 = [row["test_top1"] for row in mine]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        norm = statistics.median(norms_of(mine))
        early = statistics.median(row["first_epoch_median"] for row in mine)
        print(
            f"{variant}: test {statistics.fmean(top1):.2%} ± {spread:.2%}, "
            f"median norm {norm:.3g}, in the first epoch {early:.3g}"
        )
    if arguments.out is not None:
        write(rows, arguments.out)


def norms_of(rows: list[dict[str, Any]]) -> list[float]:
    return [norm for row in rows for norm in row["norms"]]


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shortcut.json").write_text(json.dumps(rows) + "\n")
    everything = np.array(norms_of(rows))
    edges = np.geomspace(max(everything[everything > 0].min(), 1e-8), everything.max(), 60)
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        norms = norms_of([row for row in rows if row["variant"] == variant])
        axis.hist(np.maximum(norms, edges[0]), edges, alpha=0.55, label=variant)
    seeds = len({row["seed"] for row in rows})
    axis.set(xscale="log", xlabel="L2 norm of the first layer's gradient", ylabel=f"steps of {seeds} seeds")
    axis.set_title("Spiking ResNet34 (post-addition, width 0.25, IF, T=4) on digits")
    axis.legend()
    figure.savefig(folder / "shortcut.png", dpi=110)


if __name__ == "__main__":
    main()
