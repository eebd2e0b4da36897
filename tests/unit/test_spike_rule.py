"""What no hardware of binary events could run is refused by name; whatever is spike-driven passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models.equivalence import check_equivalence
from spikefleet_models.neurons import NeuronConfig, build_neuron
from spikefleet_models.slots import NotSpikeDrivenError, ThermometerNode
from spikefleet_models.spike_edges import Analogue, SpikeFed, layer_inputs


class SN(nn.Module):
    """A neuron on merged time and batch."""

    def __init__(self, timesteps: int, neuron: nn.Module) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(x.unflatten(0, (self.timesteps, -1))).flatten(0, 1)


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class AddsSpikes(nn.Module):
    def forward(self, spikes: Tensor) -> Tensor:
        return spikes + 1


class Pools(nn.Module):
    def forward(self, spikes: Tensor) -> Tensor:
        return F.max_pool2d(spikes, 2)


class Convolves(nn.Module):
    def forward(self, spikes: Tensor) -> Tensor:
        return F.conv2d(spikes, spikes.new_ones(1, 3, 1, 1))


class Between(nn.Module):
    """Something between a neuron and its convolution."""

    def __init__(self, between: nn.Module, bound: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sn, self.between = SN(1, build_neuron(NeuronConfig(kind="ilif", bound=bound))), between
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.between(self.sn(x * bound_of(self))))


def bound_of(net: nn.Module) -> int:
    node = net.sn.neuron
    return node.node.bound if isinstance(node, ThermometerNode) else node.bound


@pytest.mark.parametrize(
    ("between", "bound", "sentence"),
    [
        (AddsSpikes(), 4, r"neuron sn.neuron \(D=4\) feeds add"),
        (AddsSpikes(), 1, "conv is fed with integers computed from the spikes of sn.neuron by add"),
        (nn.BatchNorm2d(3), 2, r"\(D=2\) feeds native_batch_norm"),
        (nn.AvgPool2d(2), 4, "feeds avg_pool2d"),
        (Convolves(), 1, "feeds convolution; .* no convolution but these"),
    ],
)
def test_spikes_used_otherwise_are_refused(between: nn.Module, bound: int, sentence: str) -> None:
    with pytest.raises(NotSpikeDrivenError, match=sentence):
        check_equivalence(Between(between, bound), pictures())


def test_integers_as_outputs_are_refused() -> None:
    with pytest.raises(NotSpikeDrivenError, match=r"neuron 1.neuron \(D=4\) is an output of the network"):
        check_equivalence(nn.Sequential(nn.Conv2d(3, 3, 1), SN(1, build_neuron(NeuronConfig(kind="ilif")))), pictures())


@pytest.mark.parametrize("bound", [1, 4])
def test_max_pools_of_spikes_stay_spikes(bound: int) -> None:
    net = Between(Pools(), bound)
    assert layer_inputs(net, pictures()) == {"conv": SpikeFed(("sn.neuron",), 1, bound)}
    assert check_equivalence(net, pictures()).passed


def test_averages_of_binary_spikes_are_analogue() -> None:
    inputs = layer_inputs(Between(nn.AvgPool2d(2), 1), pictures())
    assert inputs == {"conv": Analogue("its input is real-valued, computed from spikes by avg_pool2d")}
