"""A network package that answers requests: what MLflow's loader calls, here or in the code that a version brings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from spikefleet.config.recipes import parse_model, parse_transform
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.plugins import load_plugins
from spikefleet.registry import served_events, served_input
from spikefleet.registry.package import load_network
from spikefleet.tasks import AnyTask, LossSettings, task_class
from spikefleet_models.kernels import unit_form
from spikefleet_models.low_precision import check_precision
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.reparam import deploy
from spikefleet_pipelines.in_memory import image_batch
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.event_frames_config import EventFramesConfig


@dataclass(frozen=True)
class ServedNetwork:
    """A network in evaluation mode on the CPU, with what turns images into its input and its output into answers."""

    network: nn.Module
    transform: BatchTransformConfig
    task: AnyTask
    channels: int
    size: tuple[int, int] | None
    """(height, width) that images are resized to; None keeps their sizes."""
    sensor: tuple[int, int] | None = None
    """Height and width of the event camera; None for images."""

    @classmethod
    def open(cls, package: Path, precision: str = "fp32") -> Self:
        """Verifies a package and builds its network.

        Args:
            package: its directory.
            precision: bf16 or int8 serves the deployed network with rounded weights.

        Raises:
            UserError: the package is not intact, or there is no such precision of its network, or
                SPIKEFLEET_KERNELS has no known value.
        """
        load_plugins()
        network, config = load_network(package)
        try:
            if check_precision(precision) != "fp32":
                network = deploy(network, precision=check_precision(precision))
            if spiking_nodes(network):
                unit_form(torch.device("cpu"))  # compiles, which the first request would wait for
        except ValueError as error:
            raise UserError(f"{package}: {error}") from None
        model, data = parse_model(config["model"], str(package)), DataSummary.read(package)
        task = task_class(config["task"]).build(model, data, LossSettings())
        transform = parse_transform(config["data"]["transform"], str(package))
        transform = transform.for_timesteps(model.simulated_timesteps)
        return cls(network, transform, task, model.in_channels, task.input_size(data), data.sensor)

    def answer(self, images: Any) -> Any:
        """Preprocesses images or events as in evaluation, and runs the network.

        Args:
            images: `[B, C, H, W]`, integers from 0 to 255; an array, or nested lists of images that may differ in size.
                Of a network of events, windows as `served_events.EXPECTED` says.

        Returns:
            What the task serves.

        Raises:
            UserError: the images have another form.
        """
        if isinstance(self.transform, EventFramesConfig):
            assert self.sensor is not None, "the data of a network of events have a sensor"
            given = list(served_events.batches(images, self.sensor, self.transform))
        else:
            pixels = list(served_input.batches(images, self.channels, self.size))
            given = [image_batch(one, self.transform, self.channels) for one in pixels]
        with torch.inference_mode():
            return self.task.joined([self.task.serve(self.network, one) for one in given])
