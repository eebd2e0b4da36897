"""Sums that fp64 holds exactly in every order, and what rounding does where they are not: the grid, flips."""

import json
import math

import pytest
import torch
from torch import Tensor

from spikefleet_models import equivalence, spike_driven
from spikefleet_models.equivalence import check_equivalence, count_flips, on_grid
from spikefleet_models.slots import NotSpikeDrivenError, SlotLayer
from spikefleet_models.spike_edges import layer_inputs
from unit.test_spike_driven import SpikingNet, pictures, with_all_bits


def test_weights_off_the_grid_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the grid is for: without it fp64 rounds, and the order of the sums shows."""

    monkeypatch.setattr(equivalence, "_to_grid", lambda layer, bound: 0)
    net = with_all_bits(SpikingNet(2, 8))
    proof = check_equivalence(net, pictures())
    assert not proof.passed
    assert 0 < max(layer.max_difference for layer in proof.layers if layer.kind == "spike-fed") < 1e-10


def test_grid_moves_weights_by_less_than_its_step_and_reports_headroom() -> None:
    net = with_all_bits(SpikingNet(2, 4))
    grid, headroom = on_grid(net, layer_inputs(net, pictures().double()))
    assert list(headroom) == ["expand", "depthwise", "project", "down", "merge", "head"]
    for name, bits in headroom.items():
        fan_in = net.get_submodule(name).weight[0].numel()
        # 30 bits of weight, 2 of D; the bias weighs little, the largest weight has between 2^29 and 2^30 steps.
        assert bits == pytest.approx(53 - 30 - 2 - math.log2(fan_in), abs=1.2)
    for name in headroom:
        weight, moved = net.get_submodule(name).weight, grid.get_submodule(name).weight
        assert 0 < (weight - moved).abs().max() <= weight.abs().max() * 2.0**-29
    assert torch.equal(net.stem.weight, grid.stem.weight)


def test_sums_beyond_53_bits_are_refused() -> None:
    net = SpikingNet(2, 4)
    with torch.no_grad():
        net.project.weight.mul_(1e-16)
    with pytest.raises(NotSpikeDrivenError, match=r"layer project needs \d+ bits"):
        check_equivalence(net, pictures())


@pytest.mark.parametrize("factor", [1e-6, 1e-9, 1e-12])
def test_weights_that_died_away_beside_their_bias_are_compared(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a batch norm whose scale has decayed."""
    net = SpikingNet(2, 4)
    with torch.no_grad():
        net.project.weight.mul_(factor)
    weight = on_grid(net, layer_inputs(net, pictures()))[0].project.weight
    assert 0 < (net.project.weight - weight).abs().max() <= weight.abs().max() * 2.0**-8
    proof = check_equivalence(net, pictures())
    assert proof.passed
    assert min(layer.headroom_bits for layer in proof.layers if layer.headroom_bits is not None) >= 0
    right, shape = SlotLayer.forward, net.project.weight.shape

    def without_last_spike(layer: SlotLayer, spikes: Tensor) -> Tensor:
        kept = (spikes.cumsum(0) < spikes.sum(0)).to(spikes.dtype) if layer.weight.shape == shape else 1
        return right(layer, spikes * kept)

    monkeypatch.setattr(SlotLayer, "forward", without_last_spike)
    assert check_equivalence(net, pictures()).unequal[0] == "project"


def test_flips_are_counted_by_layer() -> None:
    net = SpikingNet(2, 4)
    flips = count_flips(net, pictures(), torch.float32)
    assert flips.dtype == "float32"
    assert [layer.name for layer in flips.layers] == [f"neurons.{i}.neuron" for i in range(6)]
    assert flips.emitted == sum(layer.emitted for layer in flips.layers) > 10000
    assert flips.flipped <= flips.emitted * 1e-3
    assert count_flips(net, pictures(), torch.float64).flipped == 0
    assert json.loads(json.dumps(flips.to_dict())) == flips.to_dict()
    sixteen = count_flips(net, pictures(), torch.bfloat16)
    assert sixteen.dtype == "bfloat16"
    assert sixteen.flipped <= sixteen.emitted * 0.05


def test_slots_are_summed_in_fp32_under_autocast() -> None:
    net = SpikingNet(1, 8).eval()
    layer = spike_driven.spike_driven(net, layer_inputs(net, pictures())).project
    spikes = torch.randint(2, (8, 16, 5, 5)).float()
    expected = layer(spikes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(spikes), expected)
    with pytest.raises(NotSpikeDrivenError, match="does not hold T=1 times D=8"):
        layer(spikes[:7])
