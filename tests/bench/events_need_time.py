"""What the built-in event sets need of time: the small network at several T, tested with slices in order and not.

    python tests/bench/events_need_time.py [--epochs N] [--seed N] [--sets NAME ...]
        [--stores DIR] [--out FILE]

Each training is that of `saccades_small` with a few overrides, by the training core in this process with one thread.
The best checkpoint by the held-out part of training is tested with its slices in order, shuffled and reversed. Results
are appended to a JSON-lines file as they come, and those that it holds are not trained again. Prints a Markdown table.
Detection (`saccade_scenes`) is not among the sets: boxes at the end of a window say where its last slice is.

    mean        the mean over T is classified: only the membranes can know the order
    weighted    one learned weight for each of the T steps
    stateless   neurons that forget after every step, and the mean over T: blind to the order
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from rich.console import Console

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.data_access import open_data
from spikefleet.data_summary import DataSummary
from spikefleet.inference.trained_network import SliceOrder, TrainedNetwork, evaluate_on_split
from spikefleet.training.checkpoints import best_network, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train
from spikefleet_models.kernels import unit_form

RECIPE = "saccades_small"
NETWORKS = {
    "mean": (),
    "weighted": ("model.decoder=weighted",),
    "stateless": ("model.neuron.kind=ilif", "model.neuron.bound=1", "model.neuron.leak=0"),
}
TIMESTEPS = {"saccades": (1, 4, 8, 16), "first_digit": (1, 4, 8, 16), "apparent_motion": (1, 3, 6, 12)}
EPOCHS = {"saccades": 20, "first_digit": 14, "apparent_motion": 14}
STATELESS_AT = {"saccades": 8, "first_digit": 8, "apparent_motion": 6}
"""T of the trainings without memory: that of the set's recipe with the 7B-Net."""
ORDERS: tuple[SliceOrder, ...] = ("shuffled", "reversed")
DEFAULT_OUT = Path(__file__).parent / "results" / "events_need_time.jsonl"


class Training(NamedTuple):
    """One row of the table."""

    data_set: str
    network: str
    timesteps: int
    epochs: int
    seed: int

    def config(self) -> Config:
        """The configuration of the training."""
        overrides = [
            f"data.source={self.data_set}",
            f"model.timesteps={self.timesteps}",
            f"train.epochs={self.epochs}",
            f"train.seed={self.seed}",
            "cluster.workers=0",
            *NETWORKS[self.network],
        ]
        if self.data_set == "apparent_motion":
            overrides.append("model.num_classes=8")
        return load_config(RECIPE, parse_overrides(overrides))


class Result(TypedDict):
    """One line of the file: a training and its top-1 accuracies on the test split."""

    data_set: str
    network: str
    timesteps: int
    epochs: int
    seed: int
    in_order: float
    shuffled: float
    reversed: float
    seconds: float
    """Processor time of the training and its tests."""


def trainings(sets: Iterable[str], epochs: int | None, seed: int) -> list[Training]:
    """The rows of the table in their order, which is that of their cost within a set."""
    rows = []
    for name in sets:
        networks = ["mean", *(["weighted"] if name == "first_digit" else [])]
        cases = [(network, t) for network in networks for t in TIMESTEPS[name] if t > 1 or network == "mean"]
        cases.append(("stateless", STATELESS_AT[name]))
        rows += [Training(name, network, t, epochs or EPOCHS[name], seed) for network, t in cases]
    return rows


def run(training: Training, stores: Path) -> Result:
    """Train, and test the best checkpoint in three orders of the slices."""
    console, began = Console(quiet=True), time.process_time()
    config = training.config()
    store = open_data(config.data, stores, console)
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(config, store, Path(folder), ProcessGroup.single(gpu=False), NullSink())
        network = best_network(load_checkpoint(Path(outcome.best_checkpoint)), config.model)
    trained = TrainedNetwork(training.data_set, network, config, DataSummary.of(store.manifest))
    found: dict[SliceOrder, float] = {}
    for order in ORDERS:
        evaluation = evaluate_on_split(trained, "test", stores, console, slice_order=order)
        found[order] = trained.task.metrics(evaluation.predictions, evaluation.targets)["top1"]
    return Result(
        data_set=training.data_set,
        network=training.network,
        timesteps=training.timesteps,
        epochs=training.epochs,
        seed=training.seed,
        in_order=outcome.test["top1"],
        shuffled=found["shuffled"],
        reversed=found["reversed"],
        seconds=round(time.process_time() - began, 1),
    )


def read_results(path: Path) -> dict[Training, Result]:
    """The results of a file, by training; empty where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    results: list[Result] = [json.loads(line) for line in lines]
    return {Training(*(row[name] for name in Training._fields)): row for row in results}  # type: ignore[literal-required]


def table(results: Iterable[Result]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| set | network | T | in order | shuffled | reversed | epochs, processor time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        scores = " | ".join(f"{100 * row[key]:.1f}" for key in ("in_order", "shuffled", "reversed"))  # type: ignore[literal-required]
        cost = f"{row['epochs']}, {row['seconds']:.0f} s"
        lines.append(f"| `{row['data_set']}` | {row['network']} | {row['timesteps']} | {scores} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(TIMESTEPS), default=list(TIMESTEPS))
    parser.add_argument("--epochs", type=int, help=f"of each training; by default {EPOCHS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stores", type=Path, default=Path("stores"))
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    wanted, known = trainings(given.sets, given.epochs, given.seed), read_results(given.out)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for training in wanted:
        if training in known:
            continue
        known[training] = row = run(training, given.stores)
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(table([row]).splitlines()[-1], flush=True)
    print(f"\nkernels: {unit_form(torch.device('cpu'))}\n\n{table(known[row] for row in wanted)}")


if __name__ == "__main__":
    main()
