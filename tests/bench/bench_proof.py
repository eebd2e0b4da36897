"""Cost of the spike check at certification, against the training that it certifies.

For each recipe a few steps of training are timed, and the whole training is that many times as long. Then the network
is checked as `certify` does, with all three legs; so little training leaves more layers silent than a whole one, which
only makes the check longer. Prints seconds, and the check as a share of the training.

    python tests/bench/bench_proof.py [--steps 20] [--stores-dir DIR] [RECIPE[,override ...] ...]

Stores that DIR does not hold are prepared in a temporary directory; fashion_mnist recipes need theirs to be there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from spikefleet.certificates.certify import measured_images
from spikefleet.certificates.spike_check import SpikeCheck, check_spikes
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.tasks import build_task
from spikefleet_models.families import build_model
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store

CASES = (
    "digits",
    "scenes_retinanet",
    "scenes_spike_yolo",
    "scenes_spike_yolo,model.neuron.bound=255",
)


def store_of(config: Config, folders: list[Path], scratch: Path) -> Store:
    """The store of a recipe's data, prepared if none of the folders holds it."""
    for folder in (*folders, scratch):
        if (folder / config.data.source).is_dir():
            return Store.open(folder / config.data.source, verify=False)
    prepare(config.data.source, None, scratch / config.data.source)
    return Store.open(scratch / config.data.source, verify=False)


def measure(config: Config, store: Store, steps: int) -> tuple[float, float, SpikeCheck]:
    """(seconds of the whole training, seconds of the check, what it found)."""
    torch.manual_seed(0)
    network, task = build_model(config.model), build_task(config, DataSummary.of(store.manifest))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    train = store.split("train")
    plan = EpochPlan(samples=len(train), global_batch=config.train.global_batch, world_size=1, rank=0, seed=0)
    begun = 0.0
    for step, batch in enumerate(BatchLoader(train, config.data.transform, train=True).epoch(plan, epoch=0)):
        if step == 1:  # the first one allocates
            begun = time.perf_counter()
        if step > steps:
            break
        losses = task.loss(network, batch, 0.0)
        optimizer.zero_grad()
        (losses["loss"] / losses.get("divisor", torch.ones(()))).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
    training = (time.perf_counter() - begun) / steps * plan.steps_per_epoch * config.train.epochs
    network.eval()
    begun = time.perf_counter()
    measured = measured_images(network, config, store)
    check = check_spikes(network, task, config, store.split("val"), measured=measured)
    return training, time.perf_counter() - begun, check


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stores-dir", type=Path, action="append", default=[])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    print(f"{torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as scratch:
        for case in given.cases:
            recipe, *overrides = case.split(",")
            config = load_config(recipe, parse_overrides(overrides))
            training, proof, check = measure(config, store_of(config, given.stores_dir, Path(scratch)), given.steps)
            images = 0 if check.chosen is None else len(check.chosen.positions)
            measured = 0 if check.metrics is None else check.metrics.images
            print(
                f"{case:45} training {training:8.1f} s  check {proof:6.2f} s  {proof / training:6.2%}  "
                f"{check.verdict}, {images} images proved, {measured} measured",
                flush=True,
            )
            rows.append({"case": case, "training": training, "check": proof, "verdict": check.verdict})
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
