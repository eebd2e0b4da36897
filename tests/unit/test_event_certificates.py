"""Proof and energy card of a network on a store of events: counts are analogue, binary frames are spikes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from spikefleet.audit import proof_again
from spikefleet.certificates.energy_card import measure_energy
from spikefleet.certificates.spike_check import check_images, check_spikes
from spikefleet.cli import app
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.tasks import build_task
from spikefleet_models.families import build_model
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig
from support.event_arrays import random_events
from support.event_stores import boxed_store

SMALL = ["model.timesteps=4", "model.num_classes=2", "model.channels=[6,8]", "model.grid=4", "cluster.workers=0"]
SMALL += ["data.transform.representation.size=null", "data.transform.representation.resize=nearest"]
BINARY = "data.transform.representation.kind=binary"
FIRST = "layers.0.conv"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    out, sensor, length = tmp_path_factory.mktemp("events") / "store", (16, 16), 80_000
    with EventStoreWriter(
        out, source="own", class_names=("a", "b"), events=EventFormat.of(sensor), options={}
    ) as writer:
        given = [random_events(400 + 60 * n, sensor, length, n) for n in range(12)]
        rows = [SourceRecording([one], n % 2, name=str(n), t0=0, duration=length + 7) for n, one in enumerate(given)]
        writer.write_recordings("train", rows)
        writer.commit()
    return Store.open(out)


def config(*overrides: str) -> Config:
    return load_config("saccades_small", parse_overrides([*SMALL, *overrides]))


def settled(of: Config, store: Store) -> nn.Module:
    """In eval mode, with running statistics of the store, so that neurons fire."""
    torch.manual_seed(0)
    network = build_model(of.model)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    loader = BatchLoader(store.samples("train"), of.transform, train=False)
    size = len(loader.split)
    (batch,) = loader.epoch(EvaluationPlan(samples=size, global_batch=size), epoch=0)
    with torch.no_grad():
        network.train()(batch.network_input)
    return network.eval()


@pytest.mark.parametrize(("overrides", "kind", "fed"), [((), "analogue", "real"), ((BINARY,), "spike-fed", "spikes")])
def test_the_first_layer_is_what_the_representation_makes_it(
    overrides: tuple[str, ...], kind: str, fed: str, store: Store
) -> None:
    of, rows = config(*overrides), store.samples("train")
    network = settled(of, store)
    check = check_spikes(network, build_task(of, DataSummary.of(store.manifest)), of, rows, images=6, measured=6)
    assert check.verdict == "proved", check.why
    assert check.proof is not None
    assert {layer.name: layer.kind for layer in check.proof.layers}[FIRST] == kind
    assert {layer.timesteps for layer in check.proof.layers if layer.kind == "neuron"} == {4}
    card = measure_energy(network, of.transform, rows, images=3)
    row = next(row for row in card.rows() if row["layer"] == FIRST)
    assert row["input"] == fed
    assert (row["macs"] == 0.0) == card.binary_input == bool(overrides)


def test_spike_check_of_a_detector_with_integers_on_events(tmp_path: Path) -> None:
    """SpikeYOLO with 2 channels at T = 4, D = 2."""
    overrides = [
        "data.transform.window=50ms",
        "model.num_classes=2",
        "cluster.workers=0",
        "model.width=0.03125",
        BINARY,
    ]
    of = load_config("saccade_scenes_spike_yolo", parse_overrides(overrides))
    boxed = boxed_store(tmp_path / "store", "own", (40, 56), 3)
    network = settled(of, boxed)
    task = build_task(of, DataSummary.of(boxed.manifest))
    check = check_spikes(network, task, of, boxed.samples("train"), images=2, measured=2)
    assert check.verdict == "proved", check.why
    assert check.proof is not None
    layers = {layer.name: layer for layer in check.proof.layers}
    assert {(layer.timesteps, layer.bound) for layer in layers.values() if layer.kind == "neuron"} == {(4, 2)}
    assert (layers["stem.conv"].kind, layers["stem.conv"].bound) == ("spike-fed", 1)
    assert check.metrics is not None


@pytest.mark.parametrize(
    ("fields", "binary"),
    [
        ({}, False),
        ({"representation": {"kind": "binary"}}, True),
        ({"representation": {"kind": "binary", "size": [8, 8]}}, True),
        ({"representation": {"kind": "binary", "size": [8, 8], "resize": "area"}}, False),
        ({"representation": {"kind": "binary", "size": [8, 8], "resize": "bilinear"}}, False),
        ({"representation": {"kind": "binary", "normalise": "std"}}, False),
        ({"representation": {"kind": "binary", "clip": 2.0}}, True),
        ({"representation": {"kind": "binary"}, "normalise": {"mean": [0.5, 0.5], "std": [1.0, 1.0]}}, False),
    ],
)
def test_which_frames_are_binary(fields: dict[str, Any], binary: bool, store: Store) -> None:
    transform = EventsTransformConfig.model_validate(fields).for_timesteps(3)
    assert transform.binary_input == binary
    plan = EvaluationPlan(samples=12, global_batch=12)
    (batch,) = BatchLoader(store.samples("train"), transform, False).epoch(plan, 0)
    holds = bool(((batch.images == 0) | (batch.images == 1)).all())
    assert holds or not binary
    assert not holds or binary or fields["representation"].get("normalise") == "std"


def test_deleted_slices_are_zeros_for_a_decoder_with_weights_over_time() -> None:
    drops = ["data.transform.keep_slices=3", "data.transform.keep_fill=drop"]
    assert config(*drops).data.transform.drops_steps
    with pytest.raises(UserError, match=r"keep_fill=drop leaves slices out .* each of model.timesteps=4"):
        config(*drops, "model.decoder=weighted")
    assert not config("data.transform.keep_slices=3", "data.transform.keep_fill=zero").data.transform.drops_steps


def test_generated_frames_prove_a_version_without_its_data(store: Store) -> None:
    for overrides in ((), (BINARY,)):
        of = config(*overrides)
        summary = DataSummary.of(store.manifest)
        network = settled(of, store)
        trained = TrainedNetwork("own", network, of, summary)
        frames = proof_again._generated(trained)
        assert frames.shape == (4, 8, 2, 16, 16)
        assert (frames.max() == 1) == bool(overrides)
        check = check_images(network, frames, of.transform.binary_input)
        assert check.verdict == "proved", check.why


def test_energy_of_a_recipe_counts_all_frames() -> None:
    def counted(*overrides: str) -> dict[str, Any]:
        arguments = ["energy", "saccades_small", *overrides, "--rate", "0.1", "--size", "17", "--json"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return {row["layer"]: row for row in found["rows"]} | {"binary": found["binary_input"]}

    four, two = counted("model.timesteps=4"), counted("model.timesteps=2")
    binary = counted("model.timesteps=4", *SMALL[-2:], BINARY)
    assert four[FIRST]["macs"] == four[FIRST]["dense"] == 2 * two[FIRST]["macs"]
    assert (binary[FIRST]["macs"], binary[FIRST]["dense"]) == (0.0, four[FIRST]["dense"])
    assert (four["binary"], binary["binary"]) == (False, True)
