"""Runs on events, with classes and with boxes, go through the gates: registered, compared on the gate recordings."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from spikefleet import registry
from spikefleet.config.recipes import load_config
from spikefleet.runs.options import Options
from spikefleet.runs.train_run import run_training
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.splitting import take_split
from support.event_stores import boxed_store, labelled_store

pytestmark = pytest.mark.slow

CLASSIFIER = """
task: classification
model: {family: small_event_net, grid: 3, num_classes: 4, timesteps: 3, in_channels: 2}
data: {source: own, transform: {kind: events}}
train: {epochs: 1, global_batch: 8, eval_batch: 16}
optim: {lr: 0.05}
registry: {dataset: own, default_name: own}
retrain: {gate_store: divided}
"""
DETECTOR = """
base: saccade_scenes_spike_yolo
model: {num_classes: 2, timesteps: 2}
data: {source: own, transform: {window: 50ms}}
train: {epochs: 1}
registry: {dataset: own, default_name: own}
retrain: {gate_store: divided, resamples: 200}
"""


@pytest.mark.parametrize("kind", ["classes", "boxes"])
def test_the_second_run_is_compared_with_the_first_on_the_gate_recordings(kind: str, tmp_path: Path) -> None:
    stores, recipe = tmp_path / "stores", tmp_path / "own.yaml"
    recipe.write_text((CLASSIFIER if kind == "classes" else DETECTOR).replace("source: own", "source: event_folder"))
    if kind == "classes":
        whole = labelled_store(tmp_path / "whole", "event_folder", (12, 16), [150] * 40, classes=4)
    else:
        whole = boxed_store(tmp_path / "whole", "event_folder", (32, 48), 20)
    take_split(whole, stores / "divided", "gate", 0.2)
    options, console = Options(tmp_path / "runs", stores), Console(file=StringIO())
    results = []
    for name, changes in (("first", {}), ("second", {"train.epochs": 2})):
        given = {"data.store": str(stores / "divided"), "cluster.workers": 0, **changes}
        results.append(run_training(load_config(str(recipe), given), options, console, name).promotion)
    first, second = results
    assert first is not None
    assert second is not None
    gate = Store.open(stores / "divided").samples("gate")
    assert first.reason == "version 1 is the first champion"
    test = "exact McNemar test" if kind == "classes" else "paired bootstrap of recordings"
    assert f"on {len(gate)} gate images" in second.reason
    assert test in second.reason
    found = registry.show("own", tracking_uri=resolve_tracking_uri(options.runs_dir)).versions
    assert len(found) == 2
