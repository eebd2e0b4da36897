"""Scaling to 8 to 256 GPUs on paper: what follows from a measured step of one GPU. No GPU takes part.

python tests/bench/bench_scaling.py --paper
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spikefleet.config.recipes import load_config

GPUS = (8, 16, 32, 64, 128, 256)
_GPUS_PER_HOST = 8
_LINK = 25e9
"""Bytes per second of a GPU's network link: 200 Gbit/s. Inside a host a switch is 10 times as fast, and left out."""
_LATENCY = 20e-6
"""Seconds of one of the 2 (N - 1) hops of a ring."""
_BACKWARD = 2 / 3
"""Share of a step in which gradients are exchanged while others are still computed."""
_BYTES_OF_IMAGE = 110e3
"""Of a JPEG of ImageNet: 140 GB over 1.28 million images."""
_CPU_S_OF_IMAGE = 1.5e-3
"""Processor time of a JPEG to 224 x 224 on one core: `bench_loading.py`."""


@dataclass(frozen=True)
class Measured:
    """A training step of one NVIDIA H200: `make gpu`, models/README.md."""

    recipe: str
    batch: int
    seconds: float


IMAGENET = Measured("imagenet_sg_resnet34", 64, 50.7e-3)
CIFAR = Measured("cifar10_sg_resnet18", 256, 42.2e-3)
_CIFAR_EPOCHS, _CIFAR_IMAGES, _TRIAL_START_S = 40, 50_000, 5.0


def parameters(recipe: str) -> int:
    """Number of parameters of a recipe's network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in load_config(recipe).model.build().parameters())


def exchange(gpus: int, size: int) -> tuple[float, float]:
    """Bytes that each GPU sends in a step by a ring all-reduce of fp32 gradients, and the seconds that it takes."""
    sent = 2 * (gpus - 1) / gpus * 4 * size
    return sent, sent / _LINK + 2 * (gpus - 1) * _LATENCY


def table() -> str:
    """The model as a table in Markdown."""
    size = parameters(IMAGENET.recipe)
    trial = _CIFAR_EPOCHS * -(-_CIFAR_IMAGES // CIFAR.batch) * CIFAR.seconds + _TRIAL_START_S
    lines = [
        f"{IMAGENET.recipe}: {size / 1e6:.2f} million parameters, {IMAGENET.batch} images a GPU, "
        f"{1000 * IMAGENET.seconds:.1f} ms a step; a trial of {CIFAR.recipe}: {_CIFAR_EPOCHS} epochs, {trial:.0f} s",
        "",
        "| GPUs | MB sent by each GPU a step | ms of the exchange | efficiency: hidden, exposed | images/s that "
        "loading gives | GB/s read | cores a host for it | trials an hour |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        sent, seconds = exchange(gpus, size)
        exposed = max(0.0, seconds - _BACKWARD * IMAGENET.seconds)
        best, worst = (IMAGENET.seconds / (IMAGENET.seconds + more) for more in (exposed, seconds))
        images = gpus * IMAGENET.batch / (IMAGENET.seconds + exposed)
        cores = images / gpus * _GPUS_PER_HOST * _CPU_S_OF_IMAGE
        lines.append(
            f"| {gpus} | {sent / 1e6:.0f} | {1000 * seconds:.1f} | {100 * best:.0f} %, {100 * worst:.0f} % | "
            f"{images:,.0f} | {images * _BYTES_OF_IMAGE / 1e9:.1f} | {cores:.0f} | {gpus * 3600 / trial:,.0f} |"
        )
    return "\n".join(lines)
