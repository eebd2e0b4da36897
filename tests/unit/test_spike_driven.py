"""Integer training equals binary inference; and every way to get the conversion wrong makes the proof fail."""

import json
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models import equivalence, slots, spike_driven
from spikefleet_models.equivalence import check_equivalence, count_flips
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron
from spikefleet_models.proof import EquivalenceProof
from spikefleet_models.slots import Layer, SlotLayer, ThermometerNode, thermometer
from spikefleet_models.spike_edges import layer_inputs

SIZES = [(T, D) for T in (1, 2, 4) for D in (1, 2, 4, 8)]


class SN(nn.Module):
    """A neuron on merged time and batch, which leaves the leading axis to whatever the neuron emits."""

    def __init__(self, timesteps: int, neuron: nn.Module) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(x.unflatten(0, (self.timesteps, -1))).flatten(0, 1)


class SpikingNet(nn.Module):
    """Residual additions, a depth-wise convolution, strides, max-pool, up-sampling, concatenation, a mean over T."""

    def __init__(self, timesteps: int, bound: int) -> None:
        super().__init__()
        torch.manual_seed(10 * timesteps + bound)
        config = NeuronConfig(kind="ilif", bound=bound)
        self.timesteps = timesteps
        self.neurons = nn.ModuleList(SN(timesteps, build_neuron(config)) for _ in range(6))
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 5, padding="same", groups=16)
        self.project = nn.Conv2d(16, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, 2, 1)
        self.merge = nn.Conv2d(20, 8, 3, 1, 1, dilation=1, bias=False)
        self.head = nn.Linear(8, 5)
        fill_range(self, bound)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(images)
        scale = torch.linspace(1, 2, self.timesteps, dtype=x.dtype).view(-1, 1, 1, 1, 1)
        x = (x * scale).flatten(0, 1)  # steps differ, so that their order matters
        y = self.depthwise(self.neurons[1](self.expand(self.neurons[0](x))))
        x = x + self.project(self.neurons[2](y))
        low = self.down(self.neurons[3](F.max_pool2d(x, 3, 1, 1)))
        both = torch.cat((x, F.interpolate(low, scale_factor=2)), dim=1)
        merged = self.merge(self.neurons[4](both))
        scores = self.head(self.neurons[5](F.max_pool2d(merged, 8).flatten(1)))
        T = self.timesteps
        return merged.unflatten(0, (T, -1)).mean(0), scores.unflatten(0, (T, -1)).mean(0)


@torch.no_grad()
def fill_range(net: nn.Module, bound: int) -> None:
    """Scale and shift every layer so that neurons behind it emit every integer from 0 to `bound`."""

    def rescale(module: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        factor, shift = 0.5 * bound / output.std(), torch.zeros(())
        module.weight.mul_(factor)
        if module.bias is not None:
            shift = 0.5 * bound - output.mean() * factor
            module.bias.mul_(factor).add_(shift)
        return output * factor + shift

    hooks = [module.register_forward_hook(rescale) for module in net.modules() if isinstance(module, Layer)]
    net(pictures())
    for hook in hooks:
        hook.remove()


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def layers_of(proof: EquivalenceProof, kind: str) -> list[str]:
    return [layer.name for layer in proof.layers if layer.kind == kind]


@pytest.mark.parametrize(("T", "D"), SIZES)
def test_binary_inference_equals_integer_training(T: int, D: int) -> None:
    proof = check_equivalence(SpikingNet(T, D), pictures())
    assert proof.failure is None
    assert proof.passed
    assert proof.max_output_difference == 0
    assert layers_of(proof, "spike-fed") == ["expand", "depthwise", "project", "down", "merge", "head"]
    assert layers_of(proof, "analogue") == ["stem"]
    assert len(layers_of(proof, "neuron")) == 6
    for layer in proof.layers:
        if layer.kind != "analogue":
            assert (layer.timesteps, layer.bound, layer.equal, layer.binary) == (T, D, True, True)
            assert 0.01 < layer.ones < 0.999, layer
    assert json.loads(json.dumps(proof.to_dict())) == proof.to_dict()


def test_the_network_really_uses_its_integers_and_its_time() -> None:
    net = SpikingNet(2, 4).eval()
    seen = []
    net.neurons[2].neuron.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(pictures())
    assert seen[0].unique().tolist() == [0, 1, 2, 3, 4]
    assert not torch.equal(seen[0][0], seen[0][1])


def test_the_binary_form_holds_binary_spikes_and_the_same_state_dict() -> None:
    net = SpikingNet(2, 4).eval()
    binary = spike_driven.spike_driven(net, layer_inputs(net, pictures()))
    assert list(binary.state_dict()) == list(net.state_dict())
    assert isinstance(binary.neurons[0].neuron, ThermometerNode)
    assert isinstance(binary.depthwise, SlotLayer)
    assert isinstance(binary.stem, nn.Conv2d)
    given: list[Tensor] = []
    binary.depthwise.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    outputs = binary(pictures(3))
    assert given[0].shape == (2 * 4 * 3, 16, 8, 8)
    assert set(given[0].unique().tolist()) == {0, 1}
    for output, expected in zip(outputs, net(pictures(3)), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, SlotLayer) for module in net.modules())


def test_thermometer_is_time_major() -> None:
    counts = torch.tensor([[0, 1, 3], [4, 2, 0]], dtype=torch.float16)
    slots = thermometer(counts, 4)
    assert slots.dtype == torch.float16
    assert slots.tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]


def test_a_shared_layer_and_a_shared_neuron() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.sn, self.conv = SN(2, build_neuron(NeuronConfig(kind="ilif"))), nn.Conv2d(3, 3, 3, padding=1)
            self.again = self.conv
            fill_range(self, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = (x * 4).repeat(2, 1, 1, 1)
            y = self.again(self.sn(x))
            return y, self.conv(self.sn(F.max_pool2d(y, 2)))

    proof = check_equivalence(Shared(), pictures())
    assert proof.passed
    assert [layer.kind for layer in proof.layers] == ["neuron", "spike-fed"]


# Each of these is a mistake that someone could make, or has made in published code.


def bias_in_every_slot(layer: SlotLayer, spikes: Tensor) -> Tensor:
    T, D = layer.timesteps, layer.slots
    y = layer._weigh(spikes, layer.weight)
    if layer.bias is not None:
        y = y + layer.bias.view(layer._bias_shape)
    return y.unflatten(0, (T, D, -1)).sum(1).flatten(0, 1)


def norm_in_every_slot(layer: SlotLayer, spikes: Tensor) -> Tensor:
    y = layer._weigh(spikes, layer.weight)
    shape = layer._bias_shape
    mean = torch.linspace(-0.1, 0.1, y.shape[1], dtype=y.dtype).view(shape)
    y = (y - mean) / 1.5
    y = y.unflatten(0, (layer.timesteps, layer.slots, -1)).sum(1).flatten(0, 1) * 1.5 + mean
    return y if layer.bias is None else y + layer.bias.view(shape)


def slots_first(counts: Tensor, bound: int) -> Tensor:
    """[D * T, ...]: slots slowest."""
    slots = thermometer(counts, bound)
    return slots.unflatten(0, (-1, bound)).transpose(0, 1).flatten(0, 1)


def one_slot_short(counts: Tensor, bound: int) -> Tensor:
    return thermometer(counts.clamp(max=bound - 1), bound)


def integer_in_the_first_slot(counts: Tensor, bound: int) -> Tensor:
    """Sums are right to the last bit, and nothing is spike-driven."""
    slots = torch.zeros_like(thermometer(counts, bound)).unflatten(0, (-1, bound))
    slots[:, 0] = counts
    return slots.flatten(0, 1)


def negative_spike(counts: Tensor, bound: int) -> Tensor:
    """One slot 2, the next -1 where the integer is 1: sums are right again."""
    slots = thermometer(counts, bound).unflatten(0, (-1, bound)).clone()
    slots[:, 0] += (counts == 1).to(counts.dtype)
    slots[:, 1] -= (counts == 1).to(counts.dtype)
    return slots.flatten(0, 1)


@pytest.mark.parametrize(("T", "D"), [(1, 2), (1, 4), (2, 4)])
@pytest.mark.parametrize("wrong", [bias_in_every_slot, norm_in_every_slot])
def test_wrong_layers_are_found(
    T: int, D: int, wrong: Callable[[SlotLayer, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotLayer, "forward", wrong)
    proof = check_equivalence(SpikingNet(T, D), pictures())
    assert not proof.passed
    assert not proof.outputs_equal
    assert proof.unequal[0] == "expand"
    assert proof.failure is None
    assert json.loads(json.dumps(proof.to_dict()))["passed"] is False


WRONG_SLOTS = [
    (wrong, T, D)
    for wrong in (one_slot_short, integer_in_the_first_slot, negative_spike, slots_first)
    for T, D in ((1, 4), (2, 2), (4, 4))
    if not (wrong is slots_first and T == 1)  # one step has no order
]


@pytest.mark.parametrize(("wrong", "T", "D"), WRONG_SLOTS)
def test_wrong_slots_are_found(
    wrong: Callable[[Tensor, int], Tensor], T: int, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "thermometer", wrong)
    proof = check_equivalence(SpikingNet(T, D), pictures())
    assert not proof.passed
    assert "neurons.0.neuron" in proof.unequal
    if wrong in (integer_in_the_first_slot, negative_spike):
        # Only the look at the slots themselves can tell.
        assert proof.outputs_equal
        assert all(layer.equal for layer in proof.layers)
        assert "expand" in proof.unequal


def replaced(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], None]) -> None:
    def build(*arguments: object) -> nn.Module:
        binary = spike_driven.spike_driven(*arguments)
        change(binary)
        return binary

    monkeypatch.setattr(equivalence, "spike_driven", build)


@pytest.mark.parametrize("T", [1, 4])
def test_a_neuron_left_integer_is_found(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_integer(binary: nn.Module) -> None:
        binary.neurons[2].neuron = binary.neurons[2].neuron.node

    replaced(monkeypatch, leave_integer)
    proof = check_equivalence(SpikingNet(T, 4), pictures())
    assert not proof.passed
    assert "does not hold T=" in proof.failure
    assert proof.to_dict()["max_output_difference"] is None


@pytest.mark.parametrize("D", [1, 3, 5])
def test_layers_with_another_number_of_slots_are_found(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_slots(binary: nn.Module) -> None:
        binary.project.slots = D

    replaced(monkeypatch, other_slots)
    assert not check_equivalence(SpikingNet(2, 4), pictures()).passed


def test_a_neuron_with_another_bound_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_bound(binary: nn.Module) -> None:
        binary.neurons[1].neuron.node.bound = 3

    replaced(monkeypatch, other_bound)
    assert "neurons.1.neuron" in check_equivalence(SpikingNet(2, 4), pictures()).unequal


def test_a_layer_without_its_bias_and_one_without_a_spike_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_bias(binary: nn.Module) -> None:
        binary.head.bias = None

    replaced(monkeypatch, without_bias)
    proof = check_equivalence(SpikingNet(2, 4), pictures())
    assert proof.unequal == ("head",)
    monkeypatch.undo()

    def drop_one(binary: nn.Module) -> None:
        with torch.no_grad():
            binary.merge.weight[0, 0, 1, 1] += 2.0**-30

    replaced(monkeypatch, drop_one)
    proof = check_equivalence(SpikingNet(2, 4), pictures())
    assert "merge" in proof.unequal
    assert 0 < proof.max_output_difference < 1


FAULTS = [RuntimeError("out of memory"), torch.OutOfMemoryError("out of memory"), MemoryError(), KeyboardInterrupt()]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("compare", [check_equivalence, count_flips])
def test_faults_of_the_machine_are_no_findings(
    compare: Callable[[nn.Module, Tensor], object], fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: nn.Module, inputs: object) -> None:
        raise fault

    def fail_at_the_end(binary: nn.Module) -> None:
        binary.head.register_forward_pre_hook(fail)

    replaced(monkeypatch, fail_at_the_end)
    with pytest.raises(type(fault)):
        compare(SpikingNet(1, 4), pictures())
    monkeypatch.undo()
    assert check_equivalence(SpikingNet(1, 4), pictures()).passed


def test_other_shapes_in_the_binary_form_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def crop(binary: nn.Module) -> None:
        binary.register_forward_hook(lambda module, inputs, outputs: (outputs[0][..., 1:], outputs[1]))

    def fewer_outputs(binary: nn.Module) -> None:
        binary.register_forward_hook(lambda module, inputs, outputs: outputs[:1])

    replaced(monkeypatch, crop)
    proof = check_equivalence(SpikingNet(1, 4), pictures())
    assert not proof.passed
    assert proof.max_output_difference == math.inf
    monkeypatch.undo()
    replaced(monkeypatch, fewer_outputs)
    assert "2 outputs, the binary form 1" in str(check_equivalence(SpikingNet(1, 4), pictures()).failure)


def silent_net() -> SpikingNet:
    """No neuron but the last two fires, and those always alike."""
    net = SpikingNet(2, 4)
    nn.init.zeros_(net.stem.weight)
    nn.init.constant_(net.stem.bias, -1.0)
    for layer in (net.expand, net.depthwise, net.project, net.down):
        nn.init.constant_(layer.bias, -1.0)
    return net


def test_layers_that_stay_silent_are_compared_alone() -> None:
    proof = check_equivalence(silent_net(), pictures())
    assert proof.passed
    assert proof.outputs_vary is False
    assert {"expand", "depthwise", "project", "down", "merge", "neurons.0.neuron"} <= set(proof.silent)
    assert proof.to_dict()["silent"] == list(proof.silent)
    assert all(layer.ones == 0 for layer in proof.layers if layer.alone)
    fired = check_equivalence(SpikingNet(2, 4), pictures())
    assert (fired.silent, fired.outputs_vary) == ((), True)
    assert check_equivalence(SpikingNet(2, 4), pictures(1)).outputs_vary is None
    with pytest.raises(ValueError, match="at least one image"):
        check_equivalence(silent_net(), pictures()[:0])


@pytest.mark.parametrize("where", ["layer", "neuron"])
def test_a_silent_layer_that_is_wrong_is_found(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the images both forms see nothing but zeros there."""

    def change(binary: nn.Module) -> None:
        with torch.no_grad():
            if where == "layer":
                binary.project.weight[0, 0, 1, 1] += 2.0**-30
            else:
                binary.neurons[2].neuron.node.input_scale = 0.5

    replaced(monkeypatch, change)
    proof = check_equivalence(silent_net(), pictures())
    assert proof.outputs_equal
    assert proof.unequal == (("project",) if where == "layer" else ("neurons.2.neuron",))


@torch.no_grad()
def with_all_bits(net: nn.Module) -> nn.Module:
    """In fp64, with weights that need all of its 53 bits; those of fp32 lie on most grids already."""
    for parameter in net.double().parameters():
        parameter.mul_(math.pi / 3)
    return net
