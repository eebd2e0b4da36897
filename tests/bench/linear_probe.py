"""How much of the class each block's spikes still tell at initialisation: accuracy of a linear classifier on them.

    python tests/bench/linear_probe.py RECIPE 'NAME: KEY=VALUE ...' ... [--all KEY=VALUE ...] [--images N] [--seeds N]
        [--stores DIR] [--out FILE.png]

For each setting, a ridge regression from the mean spikes of each channel, over time and space, to the classes is fitted
on training images and tested on test images, after each block of the untrained network (batch norm on the batch's own
statistics); the mean over networks of several seeds. Where it is at chance, later layers get nothing that tells classes
apart to such a classifier.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_access import open_data
from spikefleet_models.families import build_model
from spikefleet_models.sg_resnet import SGResNet
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan

BATCH = 200
RIDGE = 0.01


def images_and_classes(recipe: str, overrides: list[str], split: str, most: int, stores: Path) -> tuple[Tensor, Tensor]:
    """The first images [n, C, H, W] of a split without augmentation, and their classes [n]."""
    config = load_config(recipe, parse_overrides(overrides))
    part = open_data(config.data, stores, Console(quiet=True)).split(split)
    plan = EvaluationPlan(samples=len(part), global_batch=BATCH)
    loader = BatchLoader(part, config.data.transform, train=False)
    batches = list(islice(loader.epoch(plan, 0), -(-most // BATCH)))
    classes = [batch.targets for batch in batches if isinstance(batch.targets, Tensor)]
    return torch.cat([batch.images for batch in batches])[:most], torch.cat(classes)[:most]


@torch.no_grad()
def block_rates(network: SGResNet, images: Tensor) -> list[Tensor]:
    """Mean output of each channel after each block, [n, C] each."""
    parts = [[out.mean((0, 3, 4)) for out in network.forward_blocks(batch)] for batch in images.split(BATCH)]
    return [torch.cat(block) for block in zip(*parts, strict=True)]


def probe(train: Tensor, classes: Tensor, test: Tensor, test_classes: Tensor) -> float:
    """Accuracy on `test` of a ridge regression fitted on `train`."""
    mean, scale = train.mean(0), train.std(0) + 1e-4
    fitted, asked = (F.pad((rates - mean) / scale, (0, 1), value=1.0) for rates in (train, test))
    targets = F.one_hot(classes).float() * 2 - 1
    penalty = RIDGE * len(fitted) * torch.eye(fitted.shape[1])
    weights = torch.linalg.solve(fitted.T @ fitted + penalty, fitted.T @ targets)
    return float(((asked @ weights).argmax(1) == test_classes).float().mean())


def probe_blocks(recipe: str, overrides: list[str], most: int, stores: Path, seed: int) -> list[float]:
    """The probe's accuracy after each block of a new network."""
    torch.manual_seed(seed)
    network = build_model(load_config(recipe, parse_overrides(overrides)).model).train()
    assert isinstance(network, SGResNet)
    (images, classes), (test_images, test_classes) = (
        images_and_classes(recipe, overrides, split, most, stores) for split in ("train", "test")
    )
    pairs = zip(block_rates(network, images), block_rates(network, test_images), strict=True)
    return [probe(train, classes, test, test_classes) for train, test in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="+", metavar="NAME: KEY=VALUE ...")
    parser.add_argument("--all", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of all settings")
    parser.add_argument("--images", type=int, default=800, help="most images of each split")
    parser.add_argument("--seeds", type=int, default=1, help="networks of each setting, from seeds 0, 1, ...")
    parser.add_argument("--stores", type=Path, default=Path("stores"))
    parser.add_argument("--out", type=Path, help="a plot of accuracy over blocks")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds {given.seeds} leaves no network; give 1 or more")
    rows: dict[str, list[float]] = {}
    for text in given.settings:
        name, _, words = text.partition(":")
        overrides = [*given.all, *words.split()]
        found = [probe_blocks(given.recipe, overrides, given.images, given.stores, s) for s in range(given.seeds)]
        rows[name] = [fmean(of_seeds) for of_seeds in zip(*found, strict=True)]
        print(f"{name:<24}", " ".join(f"{100 * accuracy:3.0f}" for accuracy in rows[name]), "%", flush=True)
    if given.out:
        draw(rows, given.out)


def draw(rows: dict[str, list[float]], path: Path) -> None:
    """Plots accuracy over blocks, a line for each setting."""
    from matplotlib.figure import Figure  # a second, for those who ask for a plot

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, accuracies in rows.items():
        axes.plot(range(1, len(accuracies) + 1), [100 * accuracy for accuracy in accuracies], marker="o", label=name)
    axes.set(xlabel="block", ylabel="linear probe, test top-1 (%)", title="What blocks tell of the class, untrained")
    axes.set_ylim(0, 100)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
