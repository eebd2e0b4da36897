"""Seconds of `registry.ranked` in a registry of many versions, and their ratio to those in an empty registry.

The versions are made once and kept in DIR: 50 by MLflow, one in each of 50 models with about 20 tags, the others as
copies of their rows. Questions are interleaved, so that what else the machine does weighs on all alike. Prints medians
of processor and wall seconds, and the number of SQL statements.

    python tests/bench/bench_registry.py [ROUNDS] [--versions 5000] [--dir DIR] [--uri URI]

`--uri` names an empty PostgreSQL database instead, which is filled and kept.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from spikefleet.errors import UserError
from spikefleet.registry.api import ranked
from support.made_versions import ManyVersions, counted_statements, database_in, without_fsync

MODELS, EMPTY = 50, 0
QUESTIONS = {
    "metric alone": None,
    "four conditions": "timesteps<=2 and energy_mj<40 and params_m<25 and connection==bsg",
    "arithmetic": "timesteps * bound <= 4",
    "no index (full scan)": "timesteps * bound == 999 or energy_mj < 0.01",
}


def filled(uri: str, versions: int) -> ManyVersions:
    """A registry of so many versions, which is filled where it has fewer."""
    with without_fsync():
        many, dice = ManyVersions(uri), random.Random(0)
        while many.made < min(MODELS, versions):
            tags = {"timesteps": str(dice.choice([1, 2, 4])), "bound": str(dice.choice([1, 4])), "neuron": "if"}
            tags |= {"connection": dice.choice(["bsg", "add", "iand"]), "decoder": "rate", "recipe": "digits"}
            tags |= dict.fromkeys(("family", "run_name", "code_version", "proof_deployed", "proof_binary"), "x" * 12)
            metrics = {f"{split}/{name}": dice.random() for split in ("val", "test") for name in ("top1", "loss")}
            many.add(f"model{many.made % MODELS}", tags, {**metrics, "energy_mj": 80 * dice.random()})
        if many.made < versions:
            many.multiply(versions)
    return many


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--versions", type=int, default=5000)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "spikefleet-bench-registry")
    parser.add_argument("--uri")
    given = parser.parse_args()
    (given.dir / "empty").mkdir(parents=True, exist_ok=True)
    sizes = {EMPTY: database_in(given.dir / "empty"), given.versions: given.uri or database_in(given.dir)}
    for versions, uri in sizes.items():
        started = time.monotonic()
        made = filled(uri, versions).made
        print(f"{made} versions in {uri} (made or opened in {time.monotonic() - started:.0f} s)")
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {}
    statements: dict[tuple[str, int], int] = {}
    for number in range(given.rounds + 1):
        for name, where in QUESTIONS.items():
            for versions, uri in sizes.items():
                cpu, wall = time.process_time(), time.perf_counter()
                with counted_statements() as sent, suppress(UserError):  # that nothing matches
                    ranked("classification", "top1", "digits", where, top=5, any_proof=True, tracking_uri=uri)
                if number:  # the first one fills caches
                    seconds = time.process_time() - cpu, time.perf_counter() - wall
                    taken.setdefault((name, versions), []).append(seconds)
                    statements[name, versions] = len(sent)
    for name in QUESTIONS:
        cpu, wall = (statistics.median(of) for of in zip(*taken[name, given.versions], strict=True))
        empty_cpu, empty_wall = (statistics.median(of) for of in zip(*taken[name, EMPTY], strict=True))
        print(
            f"{name:22s} cpu {cpu:6.3f} s ({cpu / empty_cpu:5.1f} x)  wall {wall:6.3f} s ({wall / empty_wall:5.1f} x)  "
            f"{statements[name, given.versions]} statements ({statements[name, EMPTY]})"
        )


if __name__ == "__main__":
    main()
