"""Gradient norm by layer at initialisation: connections at 34 layers before and after, and surrogates over depth.

    python tests/bench/gradient_flow.py [--seeds 3] [--plot models/pictures/gradient_flow.png]

A quarter of the channels, T = 4, the CIFAR stem, cross entropy on 16 noise images of 32x32 with random classes.
"Before" has literal gradients of gates, a triangle of peak 2 for LIF, and AND as it is drawn; "after" has exact
gradients, a peak of 1, and AND as the identity. Printed are the gradient norm of the first layer over that of the last
one that feeds neurons, geometric mean over seeds; the least firing rate of a layer; the largest lr * |g| / |w|.
"""

import argparse
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikefleet.config.recipes import load_config
from spikefleet.training.gradient_check import GradientCheck, check_gradients, noise_batch
from spikefleet_models.gradient_flow import TRAINABLE

STAGES = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}
LIF = {
    "kind": "lif",
    "tau": 4 / 3,
    "decay_input": False,
    "v_threshold": 0.5,
    "detach_reset": False,
    "surrogate": "piecewise_quadratic",
}
CONNECTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "BSG": ({"connection": "bsg", "gate_gradient": "literal"}, {"connection": "bsg", "gate_gradient": "exact"}),
    "BSG*": (
        {"connection": "bsg_star", "gate_gradient": "literal"},
        {"connection": "bsg_star", "gate_gradient": "exact"},
    ),
    "ADD": ({"connection": "add"}, {"connection": "add"}),
    "AND": ({"connection": "and"}, {"connection": "and", "zero_init_residual": True}),
    "IAND": ({"connection": "iand"}, {"connection": "iand"}),
    "post-addition, IF, ATan": ({"connection": "post_add"}, {"connection": "post_add"}),
    "post-addition, LIF, triangle": (
        {"connection": "post_add", "neuron": {**LIF, "alpha": 2.0}},
        {"connection": "post_add", "neuron": {**LIF, "alpha": 1.0}},
    ),
    "ANN": ({"connection": "ann"}, {"connection": "ann"}),
}
SURROGATES: dict[str, dict[str, Any]] = {
    "triangle, peak 2": {"surrogate": "piecewise_quadratic", "alpha": 2.0},
    "tanh, peak 1.66 (dspike, alpha 3)": {"surrogate": "dspike", "alpha": 3.0},
    "clamp, peak 1 (rect, alpha 1)": {"surrogate": "rect", "alpha": 1.0},
    "triangle, peak 1": {"surrogate": "piecewise_quadratic", "alpha": 1.0},
    "ATan, peak 1": {"surrogate": "atan", "alpha": 2.0},
}


def checks(depth: int, model: Mapping[str, Any], seeds: int) -> list[GradientCheck]:
    """One check for each seed."""
    fields = {f"model.{key}": value for key, value in model.items()}
    fixed = {"model.stages": STAGES[depth], "model.width": 0.25, "model.decoder": "rate"}
    found = []
    for seed in range(seeds):
        config = load_config("cifar10_sg_resnet18", {**fixed, **fields, "train.seed": seed})
        batch, data = noise_batch(config, 16, 32)
        found.append(check_gradients(config, batch, data))
    return found


def mean(values: list[float]) -> float:
    """Geometric mean; 0 counts as 1e-30."""
    return math.exp(statistics.fmean(math.log(max(value, 1e-30)) for value in values))


def line(name: str, found: list[GradientCheck]) -> str:
    """First layer over last, the geometric mean over seeds, and the least firing rate."""
    ratio = mean([check.first_to_last for check in found])
    rates = [row.firing_rate for check in found for row in check.layers if row.firing_rate is not None]
    steps = mean([check.largest_step.relative_step for check in found])
    least = f"{min(rates):.3f}" if rates else "-"
    return f"{name:44} {ratio:12.3g} {least:>8} {steps:12.3g}"


def curve(found: list[GradientCheck]) -> np.ndarray:
    """Gradient norm of each convolution on the main path over that of the last one that feeds neurons (geometric mean).

    NaN where the gradient passes by, as in blocks that start as the identity.
    """
    rows = []
    for check in found:
        last = [row.gradient_norm for row in check.layers if row.firing_rate is not None and row.gradient_norm]
        last = last or [row.gradient_norm for row in check.layers if row.layer != "classifier"]
        main_path = [row.gradient_norm for row in check.layers if row.layer == "stem.conv" or "convs" in row.layer]
        rows.append([norm / last[-1] if norm else np.nan for norm in main_path])
    averaged: np.ndarray = np.exp(np.log(np.array(rows)).mean(axis=0))
    return averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="PNG of all connections at 34 layers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':44} {'first/last':>12} {'least rate':>8} {'largest step':>12}")
    for depth in STAGES:
        for name, surrogate in SURROGATES.items():
            model = {"connection": "post_add", "neuron": {**LIF, **surrogate}}
            print(line(f"{depth} layers, LIF, {name}", checks(depth, model, arguments.seeds)), flush=True)
    found = {name: [checks(34, model, arguments.seeds) for model in pair] for name, pair in CONNECTIONS.items()}
    for name, (before, after) in found.items():
        print(line(f"34 layers, {name}, before", before), flush=True)
        print(line(f"34 layers, {name}, after", after), flush=True)
    if arguments.plot is not None:
        draw(found, arguments.plot)


def draw(found: Mapping[str, list[list[GradientCheck]]], path: Path) -> None:
    """Two panels, before and after, with one curve for each connection."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    titles = ("before: literal gate gradients, triangle of peak 2", "after: exact gate gradients, triangle of peak 1")
    for position, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        axis.axhspan(*TRAINABLE, color="#1a7f37", alpha=0.08)
        for name, pair in found.items():
            norms = curve(pair[position])
            axis.plot(range(1, len(norms) + 1), norms, marker=".", ms=4, lw=1.2, label=name)
        axis.set(yscale="log", ylim=(1e-4, 1e5), xlabel="convolution, from the stem", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gradient norm / that of the last convolution")
    axes[1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
