"""A version's latency can be asked for: `latency_ms<50`."""

from __future__ import annotations

import pytest

from spikefleet import registry
from spikefleet.errors import UserError
from support.registered import Trained


def test_versions_are_found_by_their_latency(first: Trained, uri: str) -> None:
    tags = {**first.tags, "latency_device": "a processor, 1 thread"}
    for name, top1, latency in (("slow", 0.99, 80.0), ("fast", 0.9, 12.5)):
        metrics = {"val/top1": top1, "latency_ms": latency}
        first.register(f"latency_{name}", tags=tags, metrics=metrics)

    def best(where: str) -> str:
        return registry.best("classification", "top1", where=where, tracking_uri=uri).name

    assert best("latency_ms<100") == "latency_slow"
    assert best("latency_ms<50") == "latency_fast"
    with pytest.raises(UserError, match="no version"):
        best("latency_ms<10")
    text = registry.card_text("models:/latency_fast/1", tracking_uri=uri)
    assert "* 12.5 ms for an image alone, in fp32 (a processor, 1 thread)." in text
