"""How long a network takes for one image on a named device: the median of repeated runs."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.training.evaluation import first_batches
from spikefleet_models.kernels import unit_form
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Samples

LATENCY = "latency.json"
"""File name of a latency in a report and in a registered version."""

LATENCY_MS = "latency_ms"
"""Metric of a registered version and of a trial: the median, in ms for one image."""

REPEATS = 30
_LEAST_REPEATS, _WARM_UP = 5, 3
_MOST_SECONDS = 10.0
"""A network that is so slow is run fewer times, but for the least number."""


@dataclass(frozen=True)
class Latency:
    """The time of one image, alone in its batch, in fp32."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    repeats: int
    device: str
    """Name of the processor with the number of threads, or of the GPU."""
    form: str
    """Form of the spiking unit."""
    image_size: tuple[int, int]
    """H, W in pixels."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` returned. Raises UserError if it is something else."""
        try:
            height, width = plain["image_size"]
            median, fastest, slowest = (float(plain[f"{name}_ms"]) for name in ("median", "fastest", "slowest"))
            if not 0 < fastest <= median <= slowest < math.inf:
                raise ValueError(f"times must be positive and in order, found {fastest}, {median}, {slowest}")
            names = str(plain["device"]), str(plain["form"])
            return cls(median, fastest, slowest, int(plain["repeats"]), *names, (int(height), int(width)))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{LATENCY} is damaged: {error!r:.100}; measure it again") from None


@torch.no_grad()
def measure_latency(network: nn.Module, image: Tensor, repeats: int = REPEATS) -> Latency:
    """Runs a network on one image again and again.

    Args:
        network: in evaluation mode.
        image: `[1, C, H, W]`, or frames `[T, 1, C, H, W]`, on the network's device.
        repeats: number of measured runs; fewer, but at least 5, where they take more than 10 s.
    """
    device, times = image.device, list[float]()
    for run in range(_WARM_UP + repeats):
        _wait(device)
        start = time.perf_counter()
        network(image)
        _wait(device)
        if run >= _WARM_UP:
            times.append(1000 * (time.perf_counter() - start))
            if len(times) >= _LEAST_REPEATS and sum(times) > 1000 * _MOST_SECONDS:
                break
    size = (image.shape[-2], image.shape[-1])
    name, form = device_name(device), unit_form(device)
    return Latency(statistics.median(times), min(times), max(times), len(times), name, form, size)


def latency_on(network: nn.Module, config: Config, split: Samples) -> Latency:
    """The latency of a network on the first image of a split, on the CPU; see `measure_latency`."""
    loader = BatchLoader(split, config.transform, train=False)
    return measure_latency(network, next(first_batches(loader, 1, 1)).network_input)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor with torch's number of threads on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, named), platform.processor() or platform.machine())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
