"""Training step on CPU workers whose C library keeps freed memory, against the same with the library's defaults.

Each round starts two processes at a time, as two workers share two cores: first with the library's defaults, then
keeping. One thread each, which is not the main one, as in Ray's workers; network and batch of a recipe.

    python tests/bench/bench_allocator.py [--recipe NAME] [--quick] [--json FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training.malloc import keep_freed_memory
from spikefleet_models.families import build_model

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

_WORKERS = 2
_WARM_UP = 5


def median_step(recipe: str, overrides: list[str], steps: int, keep: bool, result: SimpleQueue[float]) -> None:
    """Puts the milliseconds of one step (forward, backward, SGD) of one of two workers into `result`."""
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    config = load_config(recipe, parse_overrides(overrides))
    model = build_model(config.model).to(memory_format=torch.channels_last).train()
    images = torch.randn(config.train.global_batch // _WORKERS, config.model.in_channels, 28, 28)
    labels = torch.randint(0, 10, (len(images),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    times = []
    for _ in range(_WARM_UP + steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        times.append(time.perf_counter() - start)
    result.put(1000 * statistics.median(times[_WARM_UP:]))


def in_a_thread(*arguments: Any) -> None:
    thread = threading.Thread(target=median_step, args=arguments)
    thread.start()
    thread.join()


def two_workers(recipe: str, overrides: list[str], steps: int, keep: bool) -> float:
    context = multiprocessing.get_context("spawn")
    result: SimpleQueue[float] = context.SimpleQueue()
    workers = [
        context.Process(target=in_a_thread, args=(recipe, overrides, steps, keep, result)) for _ in range(_WORKERS)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return statistics.mean(result.get() for _ in workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fashion_mnist_small", help="a classification recipe of 28 x 28 images")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if not keep_freed_memory():
        raise SystemExit("this C library is not glibc: there is nothing to measure")
    rounds, steps = (2, 10) if options.quick else (5, 30)
    pairs = []
    for turn in range(rounds):
        default, kept = (two_workers(options.recipe, options.overrides, steps, keep) for keep in (False, True))
        pairs.append((default, kept))
        print(f"round {turn + 1}/{rounds}: library's defaults {default:.1f} ms, freed memory kept {kept:.1f} ms a step")
    ratio = statistics.median(kept / default for default, kept in pairs)
    print(f"freed memory kept / library's defaults: {ratio:.3f} (median of {rounds} rounds of {steps} steps)")
    if options.json:
        figures = {"ratio": ratio, "default_ms": [a for a, _ in pairs], "kept_ms": [b for _, b in pairs]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
