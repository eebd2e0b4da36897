"""Plain operations compute what the forms that serve compute, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spikefleet_models.families import build_model, model_config
from spikefleet_models.spike_yolo.blocks import BatchNormAndPad
from spikefleet_models.traceable import PlainBatchNormAndPad, PlainNode, traceable
from support.exported import lively


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sg_resnet_tiny", {"connection": "bsg_star", "neuron": {"kind": "plif"}}),
        ("sg_resnet_tiny", {"connection": "post_add", "neuron": {"kind": "lif", "v_reset": None}}),
        ("spike_yolo_n", {"depth": 0.1, "width": 0.0625, "in_channels": 1, "timesteps": 2}),
        ("spike_yolo_n", {"depth": 0.1, "width": 0.0625, "in_channels": 1, "reparameterise": False}),
    ],
)
def test_a_traceable_network_has_the_same_outputs(name: str, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = lively(build_model(model_config(name, **fields)))
    images = torch.rand(2, 1, 32, 32)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        found, expected = traceable(network)(images), network(images)
    if isinstance(expected, torch.Tensor):
        found, expected = (found,), (expected,)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_no_custom_function_is_left() -> None:
    network = traceable(build_model(model_config("spike_yolo_n", depth=0.1, width=0.0625)))
    kinds = {type(module) for module in network.modules()}
    assert {PlainNode, PlainBatchNormAndPad} <= kinds
    assert BatchNormAndPad not in kinds


def test_a_module_in_two_places_is_replaced_once() -> None:
    torch.manual_seed(0)
    block = build_model(model_config("spike_yolo_n", depth=0.1, width=0.0625)).stages[0]
    twice = nn.Sequential(block, block).eval()
    plain, x = traceable(twice), torch.rand(2, 1, 8, 8).expand(2, block[0].sep_conv.expand.conv.in_channels, 8, 8)
    assert plain[0] is plain[1]
    with torch.no_grad():
        assert torch.equal(plain(x), twice(x))


def test_a_border_of_another_value_is_noticed() -> None:
    torch.manual_seed(0)
    padded = BatchNormAndPad(3).eval()
    with torch.no_grad():
        padded.bn.running_mean.normal_()
    plain, x = PlainBatchNormAndPad(padded), torch.rand(2, 3, 4, 5)
    assert torch.equal(plain(x), padded(x))
    nn.init.zeros_(plain.border)
    assert not torch.equal(plain(x), padded(x))
