"""Spike health: rates, dead and saturated neurons as counted by hand."""

import pytest
import torch
from torch import nn

from spikefleet_models import build_model, model_config
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron


def layer_input() -> torch.Tensor:
    """[T=2, B=3, C=1, H=1, W=4]: neuron 0 never fires, 1 always, 2 at the second step only, 3 for one sample once."""
    x = torch.zeros(2, 3, 1, 1, 4)
    x[:, :, 0, 0, 1] = 2.0
    x[1, :, 0, 0, 2] = 2.0
    x[0, 1, 0, 0, 3] = 2.0
    return x


def test_one_layer_by_hand() -> None:
    net = nn.Sequential(build_neuron(NeuronConfig()))
    with SpikeMonitor(net) as monitor:
        net(layer_input())
    (row,) = monitor.table()
    assert row["layer"] == "0"
    assert row["channels"] == 1
    assert row["rate"] == pytest.approx((6 + 3 + 1) / 24)
    assert row["dead"] == 0.25
    assert row["saturated"] == 0.25
    assert row["rate_per_step"] == pytest.approx([(3 + 1) / 12, (3 + 3) / 12])
    expected = {"firing_rate": 10 / 24, "dead_fraction": 0.25, "saturated_fraction": 0.25}
    assert monitor.summary() == pytest.approx(expected)


def test_batches_add_up() -> None:
    net = nn.Sequential(build_neuron(NeuronConfig()))
    x = layer_input()
    with SpikeMonitor(net) as monitor:
        net(x[:, :1])
        net(x[:, 1:])
    with SpikeMonitor(net) as whole:
        net(x)
    assert monitor.table() == whole.table()


def test_a_silenced_and_a_driven_network_are_noticed() -> None:
    model = build_model(model_config("sg_resnet_tiny"))
    images = torch.randn(4, 1, 8, 8)
    for bias, key in ((-50.0, "dead_fraction"), (50.0, "saturated_fraction")):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, bias)
        with SpikeMonitor(model) as monitor:
            model(images)
        assert monitor.summary()[key] == 1.0


def test_pooling_weighs_layers_by_their_neurons() -> None:
    model = build_model(model_config("sg_resnet_tiny"))
    with SpikeMonitor(model) as monitor:
        model(torch.randn(4, 1, 8, 8))
    rows = monitor.table()
    sizes = [32 * 64] * 3 + [64 * 16] * 3 + [128 * 4] * 3
    assert len(rows) == len(sizes)
    pooled = sum(row["rate"] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    assert monitor.summary()["firing_rate"] == pytest.approx(pooled)


def test_hooks_live_inside_the_block_only_even_after_an_error() -> None:
    model = build_model(model_config("sg_resnet_tiny"))
    monitor = SpikeMonitor(model)
    with pytest.raises(RuntimeError, match="stop"), monitor:
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())
    model(torch.randn(2, 1, 8, 8))
    assert monitor.table() == []


def test_entering_starts_from_zero() -> None:
    net = nn.Sequential(build_neuron(NeuronConfig()))
    monitor = SpikeMonitor(net)
    with monitor:
        net(torch.full((2, 3, 1, 1, 4), 5.0))
    with monitor:
        net(torch.zeros(2, 3, 1, 1, 4))
    assert monitor.summary()["firing_rate"] == 0.0


def test_the_ann_twin_has_no_spikes_to_count() -> None:
    model = build_model(model_config("resnet18", width=0.25))
    with SpikeMonitor(model) as monitor:
        model(torch.randn(2, 3, 16, 16))
    assert monitor.table() == []
    assert monitor.summary() == {}


def test_images_of_two_sizes_are_refused() -> None:
    model = build_model(model_config("sg_resnet_tiny"))
    with SpikeMonitor(model):
        model(torch.randn(2, 1, 8, 8))
        with pytest.raises(ValueError, match="record images of one size"):
            model(torch.randn(2, 1, 16, 16))
