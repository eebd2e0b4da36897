"""A training of the recipe `fashion_mnist_sg_resnet18` for the minutes that are left."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gpu.memory_store import as_store
from gpu.session import Results, Session
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import EpochDone, StepDone
from spikefleet.training.loop import train
from spikefleet.training.stopping import TrainingStopped
from spikefleet_pipelines.sources.contents import ArrayContents
from spikefleet_pipelines.sources.fashion_mnist import read_fashion_mnist
from spikefleet_pipelines.sources.fashion_mnist_config import FashionMnistOptions

_BATCH = 256
_SETTINGS = (
    "cluster.workers=0",
    f"train.global_batch={_BATCH}",
    "optim.schedule=cosine",
    "optim.milestones=[]",
    "optim.warmup_epochs=0.5",
    "checkpoint.every_epochs=1000",
    "tracking.health_every_steps=1000000",
    "tracking.every_steps=50",
)


class _Watch:
    """Keeps speeds and metrics of a training."""

    def __init__(self, session: Session, results: Results, prefix: str) -> None:
        self.session, self.results, self.prefix = session, results, prefix
        self.speeds: list[float] = []

    def emit(self, event: object) -> None:
        if isinstance(event, StepDone) and "images_per_second" in event.metrics:
            self.speeds.append(event.metrics["images_per_second"])
            self.results[f"{self.prefix}images_per_second"] = sorted(self.speeds)[len(self.speeds) // 2]
        if isinstance(event, EpochDone):
            self.results.setdefault(f"{self.prefix}epochs", []).append(dict(event.metrics))
            self.session.write()


def fashion_mnist(folder: Path, minutes: float | None) -> Any:
    """The section: as many epochs as fit, with the cosine schedule that ends with them."""

    def work(session: Session, results: Results) -> None:
        contents = read_fashion_mnist(folder, FashionMnistOptions(), 0)
        if session.dry:
            contents = ArrayContents(
                contents.class_names, {name: (a[:64], b[:64]) for name, (a, b) in contents.splits.items()}
            )
        store = as_store("fashion_mnist", contents)
        seconds = min(session.left() - 12, 1e9 if minutes is None else minutes * 60)
        processes = "data.loader_processes=" + ("0" if session.dry else "12")
        begun = time.monotonic()
        if session.dry:
            epochs = 1
        else:
            # Two hundred steps show how long an epoch takes; their own start is not part of it.
            _train(session, store, results, "trial ", 2, processes, until=begun + min(25.0, seconds / 4))
            images = len(contents.splits["train"][1])
            epoch = images / results["trial images_per_second"] + 3.0  # and its evaluation
            epochs = max(1, int((seconds - (time.monotonic() - begun) - 8) / epoch))
        results["epochs planned"] = epochs
        small = ["model.width=0.125", "train.global_batch=32"] if session.dry else []
        _train(session, store, results, "", epochs, processes, *small, until=begun + seconds)
        results["device_memory_mib"] = None if session.dry else torch.cuda.max_memory_allocated() / 2**20

    return work


def _train(
    session: Session, store: Any, results: Results, prefix: str, epochs: int, *settings: str, until: float
) -> None:
    device = session.device
    gpu = f"cluster.gpu={str(device.type == 'cuda').lower()}"
    overrides = [*_SETTINGS, gpu, f"train.epochs={epochs}", *settings]
    config = load_config("fashion_mnist_sg_resnet18", parse_overrides(overrides))
    watch = _Watch(session, results, prefix)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = train(
                config, store, Path(folder), ProcessGroup(0, 1, device), watch,
                stop_requested=lambda: time.monotonic() > until,
            )  # fmt: skip
            results |= {f"{prefix}test": dict(outcome.test), f"{prefix}steps": outcome.steps}
        except TrainingStopped as stopped:
            results[f"{prefix}stopped after steps"] = stopped.args
        finally:
            results[f"{prefix}training seconds"] = round(time.monotonic() - begun, 1)
