"""What no hardware of binary events could run is refused by name; whatever is spike-driven passes."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models.equivalence import check_equivalence
from spikefleet_models.gates import Gate
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import ILIF, build_neuron
from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_models.spike_edges import Analogue, SpikeFed, check_finite, layer_inputs

STEPS = 3


class SN(nn.Module):
    """A neuron on merged time and batch."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(x.unflatten(0, (STEPS, -1))).flatten(0, 1)


class Net(nn.Module):
    """Image -> `stem` -> `first` -> `way`, mostly by `conv` -> `last` -> `head` -> `end`; 3 channels of 4x4 pixels."""

    def __init__(
        self, bound: int, way: Callable[["Net", Tensor], Tensor], end: Callable[[Tensor], Any] = Tensor.sum
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv, self.head = (nn.Conv2d(3, 3, kernel, padding=kernel // 2) for kernel in (1, 3, 1))
        self.second = nn.Conv2d(3, 3, 1)
        self.first, self.last = (SN(build_neuron(NeuronConfig(kind="ilif", bound=bound))) for _ in range(2))
        self.bn, self.linear, self.over_time = nn.BatchNorm2d(3), nn.Linear(4, 4), nn.Linear(STEPS, STEPS)
        self.gate = Gate("and")
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("kept", torch.zeros(STEPS, 3, 4, 4))
        self.state: list[Any] = []
        self.bound, self.way, self.end = bound, way, end
        with torch.no_grad():
            self.stem.weight.abs_()
            self.conv.weight.abs_()

    def forward(self, images: Tensor) -> Any:
        x = self.stem(images * self.bound)
        times = torch.linspace(0.5, 1.5, STEPS, dtype=x.dtype).view(-1, 1, 1, 1, 1)
        spikes = self.first((x * times).flatten(0, 1))
        return self.end(self.head(self.last(self.way(self, spikes))))


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0] / 2


def quantised(net: Net, s: Tensor) -> Tensor:
    return net.second((net.conv(s) * 4).clamp(0, 4).round() / 4)


def by_index(net: Net, s: Tensor) -> Tensor:
    return net.conv(torch.zeros_like(s).scatter_(1, s.long().clamp(0, 2), 1.0))


def in_place_on_a_view(net: Net, s: Tensor) -> Tensor:
    current = net.conv(s)
    current[:, :1].mul_(0.5)
    return current


def in_place_on_spikes(net: Net, s: Tensor) -> Tensor:
    s.mul_(0.5)
    return net.conv(s)


def with_weights_of_spikes(net: Net, s: Tensor) -> Tensor:
    weight = net.conv._parameters.pop("weight")
    net.conv.weight = weight * s.mean()
    y = net.conv(s)
    del net.conv.weight
    net.conv.weight = weight  # type: ignore[assignment]
    return y


def in_a_thread(net: Net, s: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return net.conv(s) + pool.submit(lambda: s * 0.5).result()


def through_numpy(net: Net, s: Tensor) -> Tensor:
    return net.conv(s) + torch.tensor(float(s.numpy().mean()))


def through_a_shape(net: Net, s: Tensor) -> Tensor:
    return net.conv(s) + torch.ones(()) * s.nonzero().shape[0]


def by_a_choice(net: Net, s: Tensor) -> Tensor:
    return net.conv(s) if s.sum() > 3 else -net.conv(s)


def with_a_hook(net: Net, s: Tensor) -> Tensor:
    handle = net.conv.register_forward_hook(lambda module, inputs, output: output.sigmoid())
    y = net.conv(s)
    handle.remove()
    return y


def from_the_last_image(net: Net, s: Tensor) -> Tensor:
    y = net.conv(s) + (net.state[-1] if net.state else 0)
    net.state = [net.conv(s) * 0.5]
    return y


def from_a_buffer(net: Net, s: Tensor) -> Tensor:
    y = net.conv(s) + net.kept
    net.kept.copy_(net.conv(s) * 0.5)
    return y


# Spikes -> current of the next neuron, and what is named.
REFUSED: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "mean of two spikes": (lambda net, s: net.conv((s + F.max_pool2d(s, 3, 1, 1)) / 2), "operation div"),
    "average pool": (lambda net, s: net.conv(F.avg_pool2d(s, 3, 1, 1)), "operation avg_pool2d"),
    "times a constant": (lambda net, s: net.conv(s * 0.5), "operation mul"),
    "times a learned scalar": (lambda net, s: net.conv(s * net.scale), "operation mul"),
    "batch norm": (lambda net, s: net.conv(net.bn(s)), "batch_norm.* in bn"),
    "batch norm of currents": (lambda net, s: net.bn(net.conv(s)), "batch_norm.* in bn"),
    "matrix product": (lambda net, s: s @ net.linear.weight, "operation (mm|bmm)"),
    "linear by hand": (lambda net, s: F.linear(s, net.linear.weight * 1), "operation (mm|bmm|addmm)"),
    "two tensors of spikes": (lambda net, s: net.conv(s @ s.transpose(2, 3)), "operation bmm"),
    "AND by hand": (lambda net, s: net.conv(s * F.max_pool2d(s, 3, 1, 1)), "operation mul"),
    "quantiser for a neuron": (quantised, "operation mul"),
    "convolution of currents": (lambda net, s: net.second(net.conv(s)), "layer second"),
    "ReLU for a neuron": (lambda net, s: net.second(net.conv(s).relu()), "operation relu"),
    "sigmoid": (lambda net, s: s.sigmoid(), "operation sigmoid"),
    "where": (lambda net, s: torch.where(s > 0, net.scale, 0.0), "operation gt"),
    "cumulative sum": (lambda net, s: net.conv(s).cumsum(0), "operation cumsum"),
    "rolled": (lambda net, s: net.conv(s.roll(1, 0)), "operation roll"),
    "reversed": (lambda net, s: net.conv(s.flip(0)), "operation flip"),
    "mean over time": (lambda net, s: net.conv(s).mean(0, keepdim=True).expand(STEPS, -1, -1, -1), "operation mean"),
    "softmax": (lambda net, s: net.conv(s).softmax(1), "operation _softmax"),
    "negative spikes": (lambda net, s: net.conv(-s), "operation neg"),
    "difference": (lambda net, s: net.conv(s) - s, "operation sub"),
    "twice the spikes": (lambda net, s: torch.add(net.conv(s), s, alpha=2), "operation add"),
    "function of autograd": (lambda net, s: net.conv(Halve.apply(s)), "operation div"),
    "copied": (lambda net, s: net.conv((s.detach().clone() * 0.5).contiguous()), "operation mul"),
    "scattered": (by_index, "operation (scatter_|clamp)"),
    "chosen by spikes": (lambda net, s: net.conv(s[:, s[0, :, 0, 0].long().clamp(0, 2)]), "operation (index|clamp)"),
    "in place on a view": (in_place_on_a_view, "operation mul_"),
    "in place on spikes": (in_place_on_spikes, "operation mul_"),
    "integers of currents": (lambda net, s: net.conv(s).int().to(s.dtype), "operation _to_copy"),
    "bits": (lambda net, s: net.conv(s).view(torch.int64).to(s.dtype), "operation (view|_to_copy)"),
    "gate of currents": (lambda net, s: net.gate(net.conv(s), net.conv(s)), "operation gate and"),
    "weights of spikes": (with_weights_of_spikes, "operation mean"),
    "a hook": (with_a_hook, "operation sigmoid"),
    "a thread": (in_a_thread, "no parameter or buffer"),
    "item": (lambda net, s: net.conv(s) + s.mean().item(), "after operation _local_scalar_dense has read"),
    "numpy": (through_numpy, "after numpy has read"),
    "tolist": (lambda net, s: net.conv(s) + s.flatten().tolist()[0], "after tolist has read"),
    "a shape": (through_a_shape, "after operation nonzero has read"),
    "a choice": (by_a_choice, "after operation _local_scalar_dense has read"),
    "the last image": (from_the_last_image, "operation mul"),
    "a buffer": (from_a_buffer, "operation mul"),
}


@pytest.mark.parametrize("bound", [1, 4])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_spike_driven_is_refused_by_name(name: str, bound: int) -> None:
    way, named = REFUSED[name]
    sentence = rf"neuron last.neuron (depends on|runs) .*{named}"
    if bound > 1:
        sentence += r"|\(D=4\) feeds "  # the first wrong use of an integer is named, wherever it leads
    with pytest.raises(NotSpikeDrivenError, match=sentence):
        check_equivalence(Net(bound, way), images())


PASSED: dict[str, tuple[Callable[[Net, Tensor], Tensor], bool]] = {
    "convolution": (lambda net, s: net.conv(s), True),
    "linear": (lambda net, s: net.linear(s.flatten(2)[..., :4]).unsqueeze(2).expand(-1, -1, 4, -1), True),
    "residual": (lambda net, s: net.conv(s) + net.conv(F.max_pool2d(s, 3, 1, 1)), True),
    "max pool of currents": (lambda net, s: F.max_pool2d(net.conv(s), 3, 1, 1), True),
    "upsampling": (lambda net, s: F.max_pool2d(net.conv(F.interpolate(s, scale_factor=2)), 2), True),
    "cat": (lambda net, s: net.conv(torch.cat((s, s), 1)[:, 2:5]) + torch.cat((net.conv(s),) * 2, 1)[:, :3], True),
    "dropout": (lambda net, s: F.dropout(net.conv(F.dropout(s, 0.5, training=False)), 0.5, training=False), True),
    "in place": (lambda net, s: net.conv(s).add_(net.conv(s.clone())), True),
    "bias by hand": (lambda net, s: net.conv(s) + 0.1 + net.scale, True),
    "identity": (lambda net, s: net.conv(s) + s, False),
    "neuron on neuron": (lambda net, s: s, False),
    "sum of spikes into a neuron": (lambda net, s: s + F.max_pool2d(s, 3, 1, 1), False),
    "gate": (lambda net, s: net.conv(net.gate(s, F.max_pool2d(s, 3, 1, 1))), False),
}


@pytest.mark.parametrize("bound", [1, 4])
@pytest.mark.parametrize("name", PASSED)
def test_what_is_spike_driven_passes(name: str, bound: int) -> None:
    way, with_integers = PASSED[name]
    if bound > 1 and not with_integers:
        with pytest.raises(NotSpikeDrivenError, match=r"\(D=4\)"):
            check_equivalence(Net(bound, way), images())
        return
    proof = check_equivalence(Net(bound, way), images())
    assert proof.failure is None
    assert proof.passed


ENDS: dict[str, Callable[[Tensor], Any]] = {
    "decoder": lambda y: (y.unflatten(0, (STEPS, -1)).mean(0) * 0.5).softmax(1).cumsum(1),
    "read": lambda y: y * 2 if y.sum().item() > 0 else y,
    "shape": lambda y: y.flatten()[y.flatten() > -math.inf],
    "names": lambda y: {"boxes": y, "scores": (y.sigmoid(), 3)},
}


@pytest.mark.parametrize("name", ENDS)
def test_behind_the_last_neuron_everything_is_allowed(name: str) -> None:
    proof = check_equivalence(Net(4, lambda net, s: net.conv(s), ENDS[name]), images())
    assert proof.failure is None
    assert proof.passed


ACAUSAL: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "cat of reversed views": lambda net, s: net.conv(torch.cat(s.split(s.shape[0] // STEPS)[::-1])),
    "stack of reversed currents": lambda net, s: torch.stack(net.conv(s).split(s.shape[0] // STEPS)[::-1]).flatten(
        0, 1
    ),
    "index_select": lambda net, s: net.conv(s).index_select(0, torch.arange(STEPS).flip(0)),
    "linear over time": lambda net, s: net.over_time(s.movedim(0, -1)).movedim(-1, 0),
    "max pool over time": lambda net, s: F.max_pool2d(net.conv(s).transpose(0, 2), (STEPS, 1), 1, (1, 0)).transpose(
        0, 2
    ),
}


@pytest.mark.parametrize("name", ACAUSAL)
def test_spikes_of_later_steps_are_found(name: str) -> None:
    """Each value is binary and each sum equal, but a step would have to wait for the next."""
    proof = check_equivalence(Net(1, ACAUSAL[name]), images())
    assert not proof.passed
    assert "neuron last.neuron depends in its first 1 of 3 steps on spikes of later ones" in str(proof.failure)


def test_subclasses_of_neurons_and_layers_are_refused() -> None:
    class Loud(ILIF):
        pass

    class Sigmoid(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    net = Net(1, lambda net, s: net.conv(s))
    net.last.neuron = Loud(1)
    with pytest.raises(NotSpikeDrivenError, match=r"neuron last.neuron is a Loud"):
        check_equivalence(net, images())
    net = Net(1, lambda net, s: net.conv(s))
    net.conv = Sigmoid(3, 3, 1)
    with pytest.raises(NotSpikeDrivenError, match=r"feeds convolution; .* no convolution but these"):
        check_equivalence(net, images())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv.weight", "head.bias", "stem.weight", "bn.running_var", "bn.running_mean"])
def test_values_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    net = Net(4, lambda net, s: net.conv(s))
    check_finite(net)
    net.state_dict()[name].view(-1)[-1] = value
    with pytest.raises(NotSpikeDrivenError, match=f"{name} holds NaN or infinity"):
        check_equivalence(net, images())
    with pytest.raises(ValueError, match="images holds NaN"):
        check_equivalence(Net(4, lambda net, s: net.conv(s)), images() * value)


def test_integers_as_outputs_are_refused() -> None:
    class Ends(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.stem(x).repeat(STEPS, 1, 1, 1))

    with pytest.raises(NotSpikeDrivenError, match=r"neuron first.neuron \(D=4\) is an output of the network"):
        check_equivalence(Ends(4, lambda net, s: s), images())


def test_convolutions_by_hand_and_integers_of_sums_are_refused_behind_the_last_neuron_too() -> None:
    for end, sentence in (
        (lambda net, s: F.conv2d(s, net.conv.weight), "feeds convolution; .* no convolution but these"),
        (lambda net, s: net.conv(s + 1), "conv is fed with integers computed from the spikes of first.neuron by add"),
    ):
        with pytest.raises(NotSpikeDrivenError, match=sentence):
            check_equivalence(Tail(1, end), images())


class Tail(Net):
    """What `way` makes of the spikes of the only neuron is the output."""

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, self.first(self.stem(x).repeat(STEPS, 1, 1, 1)))


def test_averages_of_binary_spikes_are_analogue() -> None:
    inputs = layer_inputs(Tail(1, lambda net, s: net.conv(F.avg_pool2d(s, 2))), images())
    assert inputs["conv"] == Analogue("its input is real-valued, computed from spikes by avg_pool2d")
    assert layer_inputs(Tail(4, lambda net, s: net.conv(s)), images())["conv"] == SpikeFed(("first.neuron",), STEPS, 4)
