"""The latency of one image: a median of repeated runs, on a device that is named, measured once for a checkpoint."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikefleet.certificates import latency as latency_module
from spikefleet.certificates.latency import Latency, device_name, measure_latency
from spikefleet.errors import UserError
from spikefleet.registry.version import RegisteredVersion, latency_remark

IMAGE = torch.zeros(1, 1, 8, 6)


class Slow(nn.Module):
    """Takes so many ms, one after the other, and the last for all others."""

    def __init__(self, *times: float) -> None:
        super().__init__()
        self.times, self.runs = times, 0

    def forward(self, image: Tensor) -> Tensor:
        time.sleep(self.times[min(self.runs, len(self.times) - 1)] / 1000)
        self.runs += 1
        return image


def test_it_is_the_median_without_the_first_runs() -> None:
    network = Slow(300, 300, 300, 200, 4)
    found = measure_latency(network, IMAGE, repeats=9)
    assert network.runs == 12
    assert found.repeats == 9
    assert 4 <= found.fastest_ms <= found.median_ms < found.slowest_ms
    assert found.slowest_ms >= 200 > found.median_ms
    assert found.image_size == (8, 6)
    assert measure_latency(Slow(40), IMAGE, repeats=5).median_ms >= 40


def test_a_slow_network_is_run_fewer_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "_MOST_SECONDS", 0.02)
    assert measure_latency(Slow(5), IMAGE).repeats == 5


def test_the_device_is_named_with_its_threads() -> None:
    threads = torch.get_num_threads()
    name = device_name(torch.device("cpu"))
    assert name.endswith(f", {threads} thread{'' if threads == 1 else 's'}")
    assert len(name.partition(",")[0]) > 2
    assert measure_latency(Slow(0), IMAGE, repeats=5).device == name


def test_it_is_read_as_it_was_written() -> None:
    found = measure_latency(Slow(1), IMAGE, repeats=5)
    assert Latency.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    "change", [{"median_ms": 0.0}, {"median_ms": float("nan")}, {"image_size": 3}, {"repeats": "x"}]
)
def test_what_is_no_latency_is_refused(change: dict[str, Any]) -> None:
    found = Latency(2.0, 1.0, 3.0, 30, "cpu", "lean", (8, 8))
    assert replace(found, median_ms=2.5).to_dict() != found.to_dict()
    with pytest.raises(UserError, match=r"latency.json is damaged"):
        Latency.from_dict({**found.to_dict(), **change})


def test_latencies_of_several_devices_are_named() -> None:
    def of(device: str) -> RegisteredVersion:
        return RegisteredVersion("m", 1, "r", datetime.now(UTC), {"latency_device": device}, {"latency_ms": 1.0})

    # Earlier versions have the number of repeats in the tag.
    assert latency_remark([of("a processor, 1 thread"), of("a processor, 1 thread; median of 30")]) is None
    several = [of("a processor, 1 thread"), of("a processor, 2 threads")]
    remark = latency_remark(several)
    assert remark is not None
    assert remark.endswith("between them: a processor, 1 thread, a processor, 2 threads")
    assert latency_remark([several[0], replace(several[1], metrics={})]) is None
