"""Energy card and proof agree on who is fed by spikes: for all models, and for operations between neuron and layer."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models.families import build_model, list_models, model_config
from spikefleet_models.gates import Gate, GateName, build_gate
from spikefleet_models.kernels import CpuForm
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron, spiking_nodes
from spikefleet_models.operation_counts import OperationCounts, count_operations
from spikefleet_models.reparam import deploy
from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_models.spike_edges import Analogue, LayerInput, SpikeFed, layer_inputs

SMALL: dict[str, dict[str, Any]] = {
    "sg_resnet": {"width": 0.25},
    "spike_yolo": {"width": 0.0625, "depth": 0.1},
    "spiking_yolov8": {"width": 0.0625, "depth": 0.1},
    "retinanet": {"backbone": {"width": 0.25, "asd_channel_reduction": 4}, "fpn_channels": 16},
    "seven_b_net": {"channels": (8, 8, 16), "asd_channel_reduction": 4},
    "small_event_net": {"grid": 2},
}


def small(name: str) -> dict[str, Any]:
    """Narrow, and of each stage at most two blocks: one that changes shapes and one that does not."""
    config: Any = model_config(name)
    fields = SMALL[config.family]
    if config.family == "sg_resnet":
        return {**fields, "stages": [min(blocks, 2) for blocks in config.stages]}
    if config.family == "retinanet":
        stages = [min(blocks, 2) for blocks in config.backbone.stages]
        return {**fields, "backbone": {**fields["backbone"], "stages": stages}}
    return fields


def members() -> list[str]:
    """A model of each configuration: when they are small, most sizes of a family are the same."""
    names = {model_config(name, **small(name)).model_dump_json(): name for name in reversed(list_models())}
    return sorted(names.values())


def disagreements(inputs: Mapping[str, LayerInput], counts: OperationCounts) -> list[str]:
    """Layers that the proof and the energy card take for differently fed."""
    counted = {count.layer: count.bound for count in counts.layers if count.operation != "product"}
    proved = {name: source.bound if isinstance(source, SpikeFed) else 0 for name, source in inputs.items()}
    return [name for name, bound in proved.items() if counted[name] != bound]


def bare(name: str, **overrides: Any) -> tuple[nn.Module, Tensor]:
    """A small deployed model and an image, both without data."""
    config = model_config(name, **small(name) | overrides)
    with torch.device("meta"):
        network = build_model(config)
        image = torch.empty(1, config.in_channels, 64, 64)
    return deploy(network), image


@pytest.mark.parametrize("name", members())
def test_energy_and_proof_agree_on_every_model(name: str) -> None:
    network, image = bare(name)
    counts = count_operations(network, [image], measure=False)
    if not spiking_nodes(network):
        assert not any(count.spike_fed for count in counts.layers)
        return
    if name.startswith("sew") or name == "spike_yolo_s_transformer":
        with pytest.raises(NotSpikeDrivenError, match=r"gate add.*not with binary events|\(D=4\) feeds bmm"):
            layer_inputs(network, image)
        return
    inputs = layer_inputs(network, image)
    assert disagreements(inputs, counts) == []
    layers = {n for n, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert inputs.keys() == layers
    fed = sum(isinstance(source, SpikeFed) for source in inputs.values())
    assert fed == 1 if name.startswith("small") else fed > 5


def test_a_disagreement_would_be_found() -> None:
    network, image = bare("spike_yolo_tiny")
    other, _ = bare("spike_yolo_tiny", neuron=NeuronConfig(kind="ilif", bound=2))
    found = disagreements(layer_inputs(network, image), count_operations(other, [image], measure=False))
    assert len(found) > 50


class Between(nn.Module):
    """Image -> convolution -> neuron -> `between` -> convolution, all of three channels."""

    def __init__(self, bound: int, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.neuron = build_neuron(NeuronConfig(kind="ilif", bound=bound))
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.between(self.neuron(self.first(images).unsqueeze(0)).flatten(0, 1)))


def sources(bound: int, between: Callable[[Tensor], Tensor]) -> tuple[LayerInput | str, int]:
    """What the proof and what the energy card says of the second convolution; a refusal is its sentence."""
    network, images = Between(bound, between).eval(), torch.rand(2, 3, 4, 4) * 4
    counts = {c.layer: c.bound for c in count_operations(network, [images]).layers if c.operation == "convolution"}
    try:
        return layer_inputs(network, images)["second"], counts["second"]
    except NotSpikeDrivenError as error:
        return str(error), counts["second"]


def into(buffer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda s: buffer(s).copy_(s)


def assigned(s: Tensor) -> Tensor:
    out = torch.full((s.shape[0], 3, 6, 6), 0.5)
    out[:, :, 1:-1, 1:-1] = s
    return out


KEEP: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda s: s,
    "cat": lambda s: torch.cat((s, s), 1)[:, 2:5],
    "stack": lambda s: torch.stack((s, s), 1)[:, 1],
    "repeat": lambda s: s.repeat(1, 2, 1, 1)[:, :3],
    "views": lambda s: s.unsqueeze(0).transpose(2, 3).squeeze(0).expand(2, 4, 3, 4).permute(0, 2, 1, 3),
    "reshape": lambda s: s.permute(0, 2, 3, 1).reshape(-1, 3).t().reshape(3, -1, 4, 4).transpose(0, 1),
    "max pool": lambda s: F.max_pool2d(s, 3, 1, 1),
    "upsample": lambda s: F.interpolate(s, scale_factor=2),
    "index_select": lambda s: s.index_select(1, torch.tensor([2, 0, 1])),
    "zero padding": lambda s: F.pad(s, (1, 1)),
    "clone": lambda s: s.detach().clone().contiguous(memory_format=torch.channels_last),
    "types": lambda s: s.double().to(torch.uint8).float(),
    "copy": into(torch.empty_like),
    "copy over the image's": into(lambda s: s.new_ones(s.shape)),
    "dropout": lambda s: F.dropout(s, 0.5, training=False),
}


@pytest.mark.parametrize("bound", [1, 4])
@pytest.mark.parametrize("name", KEEP)
def test_selections_keep_spikes(name: str, bound: int) -> None:
    assert sources(bound, KEEP[name]) == (SpikeFed(("neuron",), 1, bound), bound)


LOSE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "average pool": (lambda s: F.avg_pool2d(s, 2), "avg_pool2d"),
    "times a constant": (lambda s: s * 0.5, "mul"),
    "times one": (lambda s: s * 1, "mul"),
    "times one in place": (lambda s: s.mul_(1), "mul_"),
    "in place on a view": (lambda s: (s[:, :1].mul_(0.5), s)[1], "mul_"),
    "AND by hand": (lambda s: s * s, "mul"),
    "negative": (lambda s: -s, "neg"),
    "mean": (lambda s: s.mean(1, keepdim=True).expand(-1, 3, -1, -1), "mean"),
    "cumulative": (lambda s: s.cumsum(0), "cumsum"),
    "where": (lambda s: torch.where(s > 0, 0.5, 0.0), "where"),
    "padding with ones": (lambda s: F.pad(s, (1, 1), value=1.0), "constant_pad_nd"),
    "cat with a constant": (lambda s: torch.cat((s, torch.full_like(s, 0.5)), 1)[:, 2:5], "cat"),
    "assignment into a constant": (assigned, "copy_"),
    "choice by spikes": (lambda s: s.index_select(1, s.flatten()[:3].long()), "index_select"),
    "bits": (lambda s: s.view(torch.int32).float(), "view"),
    "negative bit": (lambda s: torch._neg_view(s), "_neg_view"),
    "places of maxima": (lambda s: F.max_pool2d(s, 2, return_indices=True)[1].float(), "max_pool2d_with_indices"),
    "sparse": (lambda s: s.to_sparse().to_dense(), "_to_dense"),
}


@pytest.mark.parametrize("bound", [1, 4])
@pytest.mark.parametrize("name", LOSE)
def test_other_operations_make_real_values(name: str, bound: int) -> None:
    between, operation = LOSE[name]
    proof, counted = sources(bound, between)
    assert counted == 0
    if isinstance(proof, Analogue):
        assert operation in proof.reason
    else:
        assert bound == 4
        assert "(D=4) feeds" in str(proof)


def test_sums_count_as_spikes_but_feed_no_layer_of_a_spike_driven_network() -> None:
    for add in (lambda s: s + s, lambda s: sum([s, s]), lambda s: s.add_(s), lambda s: Gate("add")(s, s)):
        refusal, counted = sources(1, add)
        assert "not with binary events" in str(refusal)
        assert counted == 2
    refusal, counted = sources(1, lambda s: s + 1)
    assert "not with binary events" in str(refusal)
    assert counted == 0
    assert sources(1, lambda s: torch.add(s, s, alpha=2))[1] == 0


@pytest.mark.parametrize("name", ["bsg", "bsg_star", "and", "iand"])
def test_gates_keep_spikes_where_both_sides_are_spikes(name: GateName) -> None:
    gate = build_gate(name, 3, 0.5, build_neuron(NeuronConfig()).surrogate_function)

    class Gated(Between):
        def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
            super().__init__(1, lambda s: self.gate(s, other(s)))
            self.gate = gate

    def fed(other: Callable[[Tensor], Tensor]) -> tuple[LayerInput, int]:
        network, images = Gated(other).eval(), torch.rand(2, 3, 4, 4)
        counts = {c.layer: c.bound for c in count_operations(network, [images]).layers if c.operation == "convolution"}
        return layer_inputs(network, images)["second"], counts["second"]

    assert fed(lambda s: s) == (SpikeFed(("neuron",), 1, 1), 1)
    for other in (lambda s: s * 0.5, lambda s: torch.full_like(s, 0.5)):
        source, counted = fed(other)
        assert isinstance(source, Analogue)
        assert counted == 0


def test_what_runs_beside_neurons_gates_and_layers_is_seen() -> None:
    """A subclass, a forward of its own and hooks of others can compute anything."""

    class Halves(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 0.5)

    class Mean(Gate):
        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return (h + x) / 2

    images = torch.rand(2, 3, 4, 4)
    network = Between(1, lambda s: s).eval()
    network.second = Halves(3, 3, 1)
    assert count_operations(network, [images]).layers[-1].bound == 0
    mean = Mean("bsg")
    assert sources(1, lambda s: mean(s, s))[1] == 0
    network = Between(1, lambda s: s).eval()
    network.neuron.register_forward_hook(lambda module, inputs, output: output / 2)
    assert layer_inputs(network, images)["second"] == Analogue("its input is real-valued, computed from spikes by div")
    network = Between(1, lambda s: s).eval()
    network.second.forward = lambda x: F.conv2d(x / 2, network.second.weight)  # type: ignore[assignment, method-assign]
    assert count_operations(network, [images]).layers[-1].bound == 0


class Smuggler(nn.Module):
    """Its second neurons start from a membrane that was computed outside of them, of the spikes of the first ones."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.spikes, self.neuron = (build_neuron(NeuronConfig(kind="ilif", bound=1)) for _ in range(2))
        self.neuron.keep_state = True
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        spikes = self.spikes(self.first(images).unsqueeze(0))
        self.neuron.reset()
        if self.scale:
            self.neuron.v = (spikes[0] * self.scale).tanh()
        return self.last(self.neuron(self.second(spikes[0]).unsqueeze(0))[0])


def test_a_membrane_from_elsewhere_is_seen_in_every_form(cpu_form: CpuForm) -> None:
    """The native form gets its address, which no operation shows."""
    images = torch.rand(2, 3, 4, 4) * 4
    assert isinstance(layer_inputs(Smuggler(0).eval(), images)["last"], SpikeFed)
    with pytest.raises(NotSpikeDrivenError, match="neuron neuron depends on operation mul"):
        layer_inputs(Smuggler(0.5).eval(), images)
