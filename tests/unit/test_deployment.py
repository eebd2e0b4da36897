"""The deployed network is the trained one; and each way to lose something on the way is found, by the layer's name."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikefleet_models.deployment import DeploymentProof, check_deployment
from spikefleet_models.equivalence import check_equivalence
from spikefleet_models.families import build_model, model_config
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron
from spikefleet_models.reparam import affine, deploy, fold_bn
from spikefleet_models.spiking_unit import SpikingUnit
from unit.test_spike_driven_models import randomise_norms

NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "sg": ("sg_resnet_tiny", {}, (2, 1, 16, 16)),
    "asd": ("sg_resnet_tiny", {"decoder": "asd", "neuron": NeuronConfig(kind="plif")}, (2, 1, 16, 16)),
    "post_add": ("sg_resnet_tiny", {"connection": "post_add", "neuron": NeuronConfig(kind="lif")}, (2, 1, 16, 16)),
    "padded": ("spike_yolo_tiny", {"reparameterise": False}, (1, 3, 64, 64)),
    "yolo": ("spike_yolo_tiny", {"timesteps": 2}, (1, 3, 64, 64)),
}


def network(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A network with drawn statistics, and images."""
    torch.manual_seed(0)
    member, fields, shape = NETWORKS[name]
    trained = randomise_norms(build_model(model_config(member, **fields)))
    return trained, list(torch.rand(shape, generator=torch.Generator().manual_seed(1)).double().split(1))


def proof_of(name: str, change: Callable[[nn.Module], object], dtype: torch.dtype = torch.float64) -> DeploymentProof:
    """Of a network that was changed after its deployment."""
    trained, images = network(name)
    trained = trained.to(dtype)
    deployed = deploy(trained)
    with torch.no_grad():
        change(deployed)
    return check_deployment(trained, deployed, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_deployed_network_is_the_trained_one_up_to_rounding(name: str, dtype: torch.dtype) -> None:
    proof = proof_of(name, lambda deployed: None, dtype)
    assert proof.why is None
    assert proof.passed
    # In fp64 nothing comes near to the bound, borders with the shift of a batch norm included.
    assert max(segment.of_tolerance for segment in proof.segments) < (1 if dtype == torch.float32 else 0.01)
    assert 0 < proof.max_difference < (1e-4 if dtype == torch.float32 else 1e-11)
    assert (proof.relative_tolerance > 1e-7) == (dtype == torch.float32)
    assert proof.segments[-1].name.startswith("output ")
    assert proof.emitted > 1000
    assert proof.flipped <= proof.emitted * 1e-3


def without_bias(name: str) -> Callable[[nn.Module], object]:
    return lambda deployed: deployed.get_submodule(name).get_parameter("bias").zero_()


def moved(name: str, by: float) -> Callable[[nn.Module], object]:
    return lambda deployed: deployed.get_submodule(name).get_parameter("weight").view(-1)[0].add_(by)


WRONG = [
    ("sg", "stem.conv", without_bias("stem.conv")),
    ("sg", "stages.1.0.convs.1", without_bias("stages.1.0.convs.1")),
    ("sg", "stages.1.0.shortcut.conv", without_bias("stages.1.0.shortcut.conv")),
    ("sg", "classifier", without_bias("classifier")),
    ("sg", "stages.0.0.convs.0", moved("stages.0.0.convs.0", 1e-8)),
    ("asd", "classifier", moved("classifier", 1e-8)),
    ("post_add", "stages.1.0.shortcut.conv", without_bias("stages.1.0.shortcut.conv")),
    ("yolo", "stages.1.0.sep_conv.project.conv", without_bias("stages.1.0.sep_conv.project.conv")),
    ("yolo", "downs.1.conv", moved("downs.1.conv", 1e-8)),
    ("yolo", "head.classes.0.2.conv", without_bias("head.classes.0.2.conv")),
]


@pytest.mark.parametrize(("name", "layer", "change"), WRONG, ids=[f"{name}-{layer}" for name, layer, _ in WRONG])
def test_a_layer_that_lost_something_is_named(name: str, layer: str, change: Callable[[nn.Module], object]) -> None:
    proof = proof_of(name, change)
    assert not proof.passed
    assert layer in proof.differing[0].layers
    assert layer in str(proof.why)
    assert "times what rounding explains" in str(proof.why)
    # Layers that others show to be right are not blamed. Those of a decoder are in one segment.
    assert len([blamed for blamed in proof.differing[0].layers if not blamed.startswith("decoder")]) <= 2


def test_a_shift_lost_in_folding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the comparison of the deployed network's own forms cannot see."""

    def without_shift(conv: nn.Conv2d, bn: nn.Module) -> nn.Conv2d:
        folded = fold_bn(conv, bn)
        assert folded.bias is not None
        with torch.no_grad():
            folded.bias.sub_(affine(bn).shift)
        return folded

    trained, images = network("sg")
    monkeypatch.setattr("spikefleet_models.reparam.fold_bn", without_shift)
    deployed = deploy(trained)
    monkeypatch.undo()
    alone = check_equivalence(deployed, torch.cat(images))
    both = check_equivalence(deployed, torch.cat(images), trained=trained)
    assert alone.passed
    assert both.binary_equal
    assert not both.passed
    assert "computed by stem.conv," in str(both.why)
    assert json.loads(json.dumps(both.to_dict()))["deployment"]["passed"] is False


def test_another_epsilon_is_found() -> None:
    trained, images = network("yolo")
    deployed = deploy(trained.double())
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps *= 1 + 1e-4
    proof = check_deployment(trained, deployed, images)
    assert "computed by stem.conv," in str(proof.why)


def test_swapped_factors_of_a_chain_are_found() -> None:
    """Two channels of a RepConv's depth-wise convolution: equal shapes, other weights."""
    trained, images = network("yolo")
    swapped = copy.deepcopy(trained)
    chain = next(name for name, module in swapped.named_modules() if type(module).__name__ == "RepConv")
    weight = swapped.get_submodule(chain).get_submodule("depthwise").get_parameter("weight")
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]
    proof = check_deployment(trained, deploy(swapped), images)
    assert chain in proof.differing[0].layers


class TwoBranches(nn.Module):
    """A current of two branches, of which one can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = build_neuron(NeuronConfig(kind="ilif"))
        self.one = nn.Conv2d(4, 4, 1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.last = build_neuron(NeuronConfig(kind="ilif"))
        self.head = nn.Conv2d(4, 2, 1)
        self.joins = True

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.first(4 * self.stem(x).unsqueeze(0))[0]
        current = self.one(spikes) + self.two(spikes) if self.joins else self.one(spikes)
        logits: Tensor = self.head(self.last(current.unsqueeze(0))[0])
        return logits.softmax(1)


def test_a_branch_that_is_missing_is_named() -> None:
    torch.manual_seed(0)
    trained = TwoBranches()
    images = [torch.rand(1, 3, 8, 8).double()]
    deployed = deploy(trained)
    assert check_deployment(trained, deployed, images).passed
    deployed.joins = False  # type: ignore[assignment]
    proof = check_deployment(trained, deployed, images)
    assert proof.differing[0].name == "last"
    assert proof.differing[0].layers == ("one", "two")


def test_a_neuron_with_another_setting_is_found_although_its_current_is_right() -> None:
    def other(deployed: nn.Module) -> None:
        deployed.get_submodule("stages.1.0.units.0.neuron").tau = 3.0  # type: ignore[assignment]

    proof = proof_of("post_add", other)
    assert [segment.name for segment in proof.differing] == ["stages.1.0.units.0.neuron"]
    assert proof.why == ("neuron stages.1.0.units.0.neuron answers the trained network's currents with other integers")


def test_a_neuron_too_many_and_other_shapes_are_findings() -> None:
    torch.manual_seed(0)
    trained, images = TwoBranches(), [torch.rand(1, 3, 8, 8).double()]
    again = deploy(trained)
    again.register_forward_pre_hook(lambda module, args: (module.first(args[0].unsqueeze(0)), args[0])[1:])
    assert "takes (1, 1, 3, 8, 8) in the deployed form" in str(check_deployment(trained, again, images).failure)
    fewer = deploy(trained)
    fewer.register_forward_hook(lambda module, args, output: output[:, :1])
    assert "outputs of other shapes" in str(check_deployment(trained, fewer, images).failure)


def test_a_tie_is_counted_and_does_not_cascade() -> None:
    """Folding moves a current across x.5; what lies behind is compared on the trained network's spikes."""
    trained = TwoBranches().double().eval()
    with torch.no_grad():
        trained.stem.weight.zero_()
        trained.stem.bias.fill_(0.375)  # 4 * 0.375 = 1.5
    deployed = copy.deepcopy(trained)
    with torch.no_grad():
        deployed.stem.bias.add_(2.0**-52)
    proof = check_deployment(trained, deployed, [torch.rand(1, 3, 8, 8).double()])
    assert proof.passed
    assert proof.segments[0].flipped in (0, proof.segments[0].emitted)
    with torch.no_grad():
        trained.stem.bias.fill_(0.125)  # 0.5 rounds to 0, a little more to 1
        deployed.stem.bias.fill_(0.125 + 2.0**-54)
    proof = check_deployment(trained, deployed, [torch.rand(1, 3, 8, 8).double()])
    assert proof.passed
    assert proof.segments[0].flipped == proof.segments[0].emitted == 4 * 8 * 8
    assert sum(segment.flipped for segment in proof.segments[1:]) == 0


def test_units_that_share_a_neuron_keep_their_order() -> None:
    """Deployment gives each convolution in front of a shared unit its own copy of it."""
    torch.manual_seed(0)
    unit = SpikingUnit(nn.BatchNorm2d(4), build_neuron(NeuronConfig(kind="lif")), 1)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(3, 4, 1), unit)
            self.two = nn.Sequential(nn.Conv2d(4, 4, 1), unit)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(self.one(4 * x)[0])[0].mean((2, 3))
            return y

    trained = randomise_norms(Shared())
    proof = check_deployment(trained, deploy(trained.double()), [torch.rand(1, 3, 8, 8).double()])
    assert proof.why is None
    assert [segment.name for segment in proof.segments] == ["one.1.neuron", "two.1.neuron", "output 0"]
