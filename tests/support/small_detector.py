"""Networks with random weights that answer every image, for what goes on around networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_summary import DataSummary
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.registry.package import write_package
from spikefleet_models.families import build_model

SIDE = 64
CLASSES = ("nought", "../up", *(f"digit {number}" for number in range(2, 10)))
"""One of them is a path, as a data set from elsewhere may have it."""


def small_detector(recipe: str = "scenes_spike_yolo") -> TrainedNetwork:
    """A SpikeYOLO of random weights, whose currents are strong enough for spikes."""
    overrides = [f"data.transform.size={SIDE}", "model.criterion.score_threshold=0"]
    if recipe == "scenes_spike_yolo":
        overrides.append("model.neuron.input_scale=4")
    config = load_config(recipe, parse_overrides(overrides))
    torch.manual_seed(3)
    network = build_model(config.model).eval()
    if recipe == "scenes_spike_yolo":
        _find_small_things(network.get_submodule("head"))
    else:
        _spread_scores(network)
    data = DataSummary("scenes", "d" * 64, CLASSES, tuple(range(10, 20)), (3, SIDE, SIDE))
    return TrainedNetwork("small", network, config, data)


def _find_small_things(head: torch.nn.Module) -> None:
    """Boxes of about two cells, of scores around a half."""
    for parameter in head.parameters():
        if parameter.shape == (64,):
            parameter.data.view(4, 16)[:, 1] += 8
        if parameter.shape == (len(CLASSES),):
            parameter.data += 6


def _spread_scores(network: torch.nn.Module) -> None:
    """RetinaNet begins with scores that differ in the ninth digit, whose order rounding decides."""
    for parameter in network.parameters():
        if parameter.ndim == 4 and parameter.shape[0] == 9 * len(CLASSES):
            parameter.data *= 10_000


def small_classifier() -> TrainedNetwork:
    """An SG ResNet for digits of random weights."""
    config = load_config("digits", parse_overrides(["model.width=0.125"]))
    torch.manual_seed(3)
    network = build_model(config.model).eval()
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):  # of batch norm: currents that make spikes
            parameter.data *= 4
    return TrainedNetwork("small", network, config, DataSummary("digits", "d" * 64, CLASSES, (), (1, 8, 8)))


def write_network(trained: TrainedNetwork, folder: Path) -> Path:
    """Writes it as the package of a registered version, which commands open by its path."""
    folder.mkdir(parents=True)
    weights = folder.with_name(f"{folder.name}.safetensors")
    save_file(trained.network.state_dict(), weights)
    summary = folder.with_name(f"{folder.name}-data")
    summary.mkdir()
    trained.data.write(summary)
    files = {path.name: path for path in summary.iterdir()}
    config = trained.config.model_dump(mode="json")
    write_package(folder, weights, config, files, {"metrics": {}})
    return folder


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] with edges and areas."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width])
