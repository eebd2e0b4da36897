"""Measures the first layer's gradient over depth, of four connections, with and without side branches.

    python tests/bench/depth_gradients.py [--seeds 3] [--recipe digits_narrow] [--results DIR] [KEY=VALUE ...]

Writes `depth_gradients.json` beside the recorded results, from which `spikefleet evidence` draws its plot. One backward
pass for each network on 8 noise images: about a minute of one core with three seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from spikefleet.config.recipes import parse_overrides
from spikefleet.reproduction.depth_gradients import CONNECTIONS, DEPTHS, DepthGradients, measure
from spikefleet.reproduction.results import shipped_results
from spikefleet.versions import code_version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--recipe", default="digits_narrow")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=shipped_results())
    given = parser.parse_args()
    torch.set_num_threads(1)
    overrides = {"model.decoder": "rate", **parse_overrides(given.overrides)}
    rows = []
    for layers in DEPTHS:
        for connection in CONNECTIONS:
            for branches in (False, True):
                found = [
                    measure(given.recipe, overrides, connection, branches, layers, seed) for seed in range(given.seeds)
                ]
                rows += found
                norms = " ".join(f"{one.first_to_last:9.3g}" for one in found)
                with_ = "with" if branches else "without"
                print(f"{layers:3} layers  {connection:14} {with_:8} branches  {norms}", flush=True)
    print(DepthGradients(given.recipe, overrides, code_version(), tuple(rows)).write(given.results))


if __name__ == "__main__":
    main()
