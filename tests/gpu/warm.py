"""Compiles, in a process of its own, what a later section would compile alone: Triton keeps kernels on disk.

python -m gpu.warm NAME
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from gpu import steps, timing


def _step(build: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    def work() -> None:
        step = build()
        for _ in range(2):
            step()

    return work


def _tiles(start: int) -> Callable[[], None]:
    def work() -> None:
        for elements, warps, channels in timing.TILES[start::3]:
            for kind in timing.KINDS:
                with timing.tile(elements, warps, channels):
                    timing.tile_call(kind, 64, 32, torch.device("cuda"))()
                    timing.tile_call(kind, 256, 8, torch.device("cuda"))()

    return work


def _works() -> dict[str, Callable[[], None]]:
    device = torch.device("cuda")
    works: dict[str, Callable[[], None]] = {f"tiles {start}": _tiles(start) for start in range(3)}
    for name in ("r18_cifar_b256", "r34_imagenet_b64"):
        variants = steps.classifiers(name, steps.SETUPS[name], device, "triton")
        for variant in ("fused bf16", "fused bf16, sew", "fused fp32", "spikingjelly best bf16", "spikingjelly fp32"):
            if variant in variants:
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
