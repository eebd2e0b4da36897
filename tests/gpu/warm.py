"""Compiles, in a process of its own, what a later section would compile alone: Triton keeps kernels on disk.

python -m gpu.warm NAME
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from gpu import steps


def _step(build: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    def work() -> None:
        step = build()
        for _ in range(2):
            step()

    return work


def _works() -> dict[str, Callable[[], None]]:
    device = torch.device("cuda")
    works: dict[str, Callable[[], None]] = {}
    for name in ("r18_cifar_b256", "r34_imagenet_b64"):
        variants = steps.classifiers(name, steps.SETUPS[name], device, "triton")
        for variant in ("fused bf16", "spikingjelly best bf16"):
            works[f"{name}: {variant}"] = _step(variants[variant])
    return works


def names() -> list[str]:
    """What there is to compile."""
    return list(_works())


def main() -> None:
    """Run one of them."""
    _works()[sys.argv[1]]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
