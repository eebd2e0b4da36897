"""What shortcut back-propagation does to a deep network: Spiking ResNet34 (post-addition, IF), narrow, on digits.

    python tests/bench/shortcut_experiment.py [--epochs N] [--seeds N] [--out FOLDER]

Trains it with and without side branches from the same seeds, by the training core itself. Prints, and writes as JSON,
the test accuracy of each seed, and the L2 norm of the first layer's gradient over all steps; draws its histogram.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt

from spikefleet.config import load_config
from spikefleet.events import Event, StepDone
from spikefleet.worker import train
from spikefleet.world import World
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store import Store

NETWORK = ["model.stages=[3,4,6,3]", "model.connection=post_add", "model.width=0.25", "tracking.every_steps=1"]
VARIANTS = {"plain": [], "with side branches": ["shortcut.where=stage"]}


class Norms:
    """Keeps the gradient norm of the first layer at each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.values.append(event.metrics["gradient/first_layer_norm"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for shortcut.json and shortcut.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        store: Store = prepare("digits", None, Path(scratch) / "digits")
        for seed in range(arguments.seeds):
            for name, extra in VARIANTS.items():
                settings = [*NETWORK, *extra, f"train.epochs={arguments.epochs}", f"train.seed={seed}"]
                config = load_config("digits", [*settings, "cluster.workers=0", "train.evaluate_every=4"])
                norms = Norms()
                outcome = train(config, store, Path(scratch) / f"{name}-{seed}", World.alone(), norms)
                row = figures.setdefault(name, {"test_top1": [], "norms": [], "first_epoch_median": []})
                row["test_top1"].append(outcome.test["top1"])
                row["norms"] += norms.values
                steps = len(norms.values) // arguments.epochs
                row["first_epoch_median"].append(statistics.median(norms.values[:steps]))
                print(
                    f"seed {seed}, {name}: test {outcome.test['top1']:.2%}, first layer's gradient: median "
                    f"{statistics.median(norms.values):.3g}, in the first epoch {row['first_epoch_median'][-1]:.3g}",
                    flush=True,
                )
    for name, row in figures.items():
        top1 = row["test_top1"]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        norm = statistics.median(row["norms"])
        print(f"{name}: test {statistics.fmean(top1):.2%} ± {spread:.2%}, median norm {norm:.3g}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "shortcut.json").write_text(json.dumps(figures) + "\n")
        figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
        everything = np.concatenate([row["norms"] for row in figures.values()])
        edges = np.geomspace(max(everything[everything > 0].min(), 1e-8), everything.max(), 60)
        for name, row in figures.items():
            axis.hist(np.maximum(row["norms"], edges[0]), edges, alpha=0.6, label=name)
        axis.set(xscale="log", xlabel="L2 norm of the first layer's gradient", ylabel="steps")
        axis.set_title("Spiking ResNet34 (width 0.25, IF, T=4) on digits")
        axis.legend()
        figure.savefig(arguments.out / "shortcut.png", dpi=110)


if __name__ == "__main__":
    main()
