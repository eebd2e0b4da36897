"""Processor time of commands that should answer at once, against an import of torch.

Each command runs in its own process; rounds are interleaved, so that what else the machine does weighs on all alike.
Prints the median of user and system seconds, and its ratio to `python -c "import torch"`.

    python tests/bench/bench_start.py [ROUNDS] [--runs-dir DIR]

`registry list` is measured where DIR holds a registry.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SPIKEFLEET = str(Path(sys.executable).with_name("spikefleet"))
LIGHT = ("--help", "--version", "train --help", "recipes", "searches", "tables", "data sources", "config show digits")


def seconds_of(command: list[str], folder: str, variables: dict[str, str]) -> float:
    """Processor seconds of a command and whatever it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env={**os.environ, **variables}, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--runs-dir", type=Path)
    given = parser.parse_args()
    yardstick = 'python -c "import torch"'
    commands: dict[str, tuple[list[str], dict[str, str]]] = {yardstick: ([sys.executable, "-c", "import torch"], {})}
    commands |= {f"spikefleet {words}": ([SPIKEFLEET, *words.split()], {}) for words in LIGHT}
    line = "spikefleet\ntrain\ndigits\nmodel.time"
    asked = {"_SPIKEFLEET_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "3"}
    commands["completion of model.time"] = ([SPIKEFLEET], asked)
    if given.runs_dir is not None:
        words = ["registry", "list", "--runs-dir", str(given.runs_dir.absolute())]
        commands["spikefleet registry list"] = ([SPIKEFLEET, *words], {})
        commands["python -c 'from mlflow import MlflowClient'"] = (
            [sys.executable, "-c", "from mlflow import MlflowClient"],
            {"MLFLOW_DISABLE_TELEMETRY": "true"},
        )
    taken: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for round_number in range(given.rounds + 1):
            for name, (command, variables) in commands.items():
                seconds = seconds_of(command, folder, variables)
                if round_number:  # the first one fills caches
                    taken[name].append(seconds)
    reference = statistics.median(taken[yardstick])
    width = max(map(len, taken))
    for name, values in taken.items():
        median = statistics.median(values)
        print(f"{name:<{width}}  {median:6.2f} s  {median / reference:5.2f} x torch")


if __name__ == "__main__":
    main()
