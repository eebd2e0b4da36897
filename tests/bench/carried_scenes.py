"""What stands still before an event camera: average precision with membranes carried over windows, and reset.

    python tests/bench/carried_scenes.py [--seeds N] [--stores DIR] [--out FILE]
        [--figure FILE.png] [--recipe RECIPE] [KEY=VALUE ...]

In `saccade_scenes` with pauses all digits of a recording stop twice while their boxes stay: the camera sends noise
alone then. A detector is trained by the training core in this process with one thread, once with
`train.stream.state=carried` and once with `reset`, where every window starts from the reset state; what was trained
with carried membranes is also tested with reset ones. Test metrics are grouped by how long nothing has moved. Results
are appended to a JSON-lines file, and trainings that it holds are not run again.

By default it is the small detector of `small_event_detector.py` on large digits of one class (`carried_scenes.yaml`),
which trains in minutes; `--recipe saccade_scenes_stream` is a tiny SpikeYOLO on digits of ten classes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

import bench.small_event_detector  # noqa: F401, registers the family
from spikefleet.canvas import never_fatal, save, subplots
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.data_access import open_data
from spikefleet.data_summary import DataSummary
from spikefleet.inference.trained_network import TrainedNetwork, evaluate_on_split
from spikefleet.training.checkpoints import best_network, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train

SMALL = Path(__file__).with_suffix(".yaml")
STATES = ("carried", "reset")
DEFAULT_OUT = Path(__file__).parent / "results" / "carried_scenes.jsonl"
LABELS = {
    ("carried", "carried"): "carried",
    ("carried", "reset"): "trained with carried membranes, tested with reset ones",
    ("reset", "reset"): "reset",
}
"""Trained and tested with which membranes; the rows of the table and the lines of the figure."""


class Result(TypedDict):
    """One line of the file: the test of one training."""

    trained: str
    """`train.stream.state` of the training."""
    tested: str
    """And of the test."""
    seed: int
    recipe: str
    overrides: list[str]
    map50: float
    map50_moving: float
    map50_still: float
    still: list[dict[str, Any]]
    """Metrics by the time since something has moved: still_us, images, objects, map50."""
    seconds: float
    """Processor time of the training; 0 where it is that of another line."""


def configured(recipe: str, state: str, seed: int, overrides: Sequence[str]) -> Config:
    """The configuration of a training."""
    own = [f"train.stream.state={state}", f"train.seed={seed}", "cluster.workers=0"]
    return load_config(recipe, parse_overrides([*overrides, *own]))


def run(recipe: str, trained: str, seed: int, overrides: list[str], stores: Path) -> list[Result]:
    """Train, and test the best checkpoint with the membranes of the training, and with reset ones."""
    console, began = Console(quiet=True), time.process_time()
    config = configured(recipe, trained, seed, overrides)
    store = open_data(config.data, stores, console)
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(config, store, Path(folder), ProcessGroup.single(gpu=False), NullSink())
        network = best_network(load_checkpoint(Path(outcome.best_checkpoint)), config.model)
    seconds, results = time.process_time() - began, []
    for tested in dict.fromkeys((trained, "reset")):
        like = TrainedNetwork(
            recipe, network, configured(recipe, tested, seed, overrides), DataSummary.of(store.manifest)
        )
        found = evaluate_on_split(like, "test", stores, console)
        details = found.details(like.task)
        metrics = details["metrics"]
        results.append(
            Result(
                trained=trained,
                tested=tested,
                seed=seed,
                recipe=Path(recipe).stem,
                overrides=overrides,
                map50=metrics["map50"],
                map50_moving=metrics["map50_moving"],
                map50_still=metrics["map50_still"],
                still=details["still"],
                seconds=round(seconds if tested == trained else 0.0, 1),
            )
        )
    return results


def table(results: Sequence[Result]) -> str:
    """The means over the seeds as a table in Markdown."""
    lines = [
        "| membranes | mAP50 | in motion | standing still | for 50 ms | for 200 ms and longer |",
        "|---|---|---|---|---|---|",
    ]
    for key, label in LABELS.items():
        rows = [row for row in results if (row["trained"], row["tested"]) == key]
        if rows:
            values = [
                *(statistics.fmean(row[name] for row in rows) for name in ("map50", "map50_moving", "map50_still")),  # type: ignore[literal-required]
                statistics.fmean(_since(row, 50_000, 50_000) for row in rows),
                statistics.fmean(_since(row, 200_000, 1 << 40) for row in rows),
            ]
            lines.append(f"| {label} | " + " | ".join(f"{100 * value:.1f} %" for value in values) + " |")
    return "\n".join(lines)


def _since(row: Result, least_us: int, most_us: int) -> float:
    """mAP50 of the label times at which nothing has moved for so long: the mean of the groups by their images."""
    groups = [one for one in row["still"] if least_us <= one["still_us"] <= most_us and one["map50"] is not None]
    return sum(one["map50"] * one["images"] for one in groups) / sum(one["images"] for one in groups)


@never_fatal
def draw(results: Sequence[Result], path: Path) -> None:
    """Plots mAP50 over the time since something has moved, a line for each row of the table."""
    figure, axes = subplots(figsize=(7.5, 4), layout="constrained")
    for key, label in LABELS.items():
        rows = [row for row in results if (row["trained"], row["tested"]) == key]
        if not rows:
            continue
        times = sorted({one["still_us"] for row in rows for one in row["still"]})
        means = [100 * statistics.fmean(_since(row, at, at) for row in rows) for at in times]
        axes.plot([at / 1000 for at in times], means, "o-", label=label)
    axes.set(
        xlabel="ms since something has moved", ylabel="test mAP50 (%)", title="Digits that stand still", ylim=(0, None)
    )
    axes.legend()
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--recipe", default=str(SMALL), help="name of a recipe, or its file")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--stores", type=Path, default=Path("stores"))
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    wanted = (Path(given.recipe).stem, given.overrides)
    results: list[Result] = [row for row in map(json.loads, lines) if (row["recipe"], row["overrides"]) == wanted]
    for seed in range(given.seeds):
        for state in STATES:
            if not any((row["trained"], row["seed"]) == (state, seed) for row in results):
                new = run(given.recipe, state, seed, given.overrides, given.stores)
                with given.out.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
                results += new
                print(f"{state}, seed {seed}: trained and tested in {new[0]['seconds']:.0f} s", flush=True)
    print(table(results))
    if given.figure is not None:
        draw(results, given.figure)


if __name__ == "__main__":
    main()
