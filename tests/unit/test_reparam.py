"""Folding and merging: same outputs in fp64, borders included; what is left is what the published counts say."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spikefleet_models import build_model, model_config
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron
from spikefleet_models.reparam import affine, deploy, fold_bn, fold_unit, merge_rep_conv, merge_sep_rep_conv
from spikefleet_models.spike_yolo.blocks import SN, ConvNorm, Plan, RepConv, SepRepConv, SpikeConv, SpikingRepConv
from spikefleet_models.spiking_unit import SpikingUnit

EXACT = 1e-12
YOLO = {"width": 0.0625, "depth": 0.1, "stem_stride": 2, "box_channels": 16, "num_classes": 3}
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("spike_yolo_s", YOLO),
    ("spike_yolo_s", {**YOLO, "timesteps": 2}),
    ("spike_yolo_ann_s", YOLO),
    ("spike_yolo_s_no_rep", {**YOLO, "timesteps": 2}),
    ("spike_yolo_s_block2", YOLO),
    ("spike_yolo_s_transformer", YOLO),
    ("spike_yolo_s_anchor", YOLO),
    ("spiking_yolov8_m", {"width": 0.0625, "depth": 0.1, "num_classes": 3}),
    ("sg_resnet18", {"width": 0.25}),
    ("sg_resnet18", {"width": 0.25, "connection": "bsg_star", "stem": "imagenet", "neuron": {"kind": "plif"}}),
    ("sg_resnet50", {"width": 0.25}),
    ("sew_resnet18", {"width": 0.25}),
    ("spiking_resnet18", {"width": 0.25}),
    ("resnet18", {"width": 0.25}),
    ("retinanet_tiny", {"num_classes": 3}),
]


def randomise(network: nn.Module) -> nn.Module:
    """fp64, evaluation, and batch norms that are far from identity yet keep the network alive."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 1.0)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.2, 0.6)
    return network.double().eval()


def outputs_of(network: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        outputs = network(images)
    return (outputs,) if isinstance(outputs, Tensor) else outputs


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(("name", "overrides"), NETWORKS)
def test_deployed_networks_give_the_same(name: str, overrides: dict[str, Any], merge: bool) -> None:
    network = randomise(build_model(model_config(name, **overrides)))
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    deployed = deploy(network, merge=merge)
    expected, outputs = outputs_of(network, images), outputs_of(deployed, images)
    assert max(output.std() for output in expected) > 1e-3
    for output, value in zip(outputs, expected, strict=True):
        assert (output - value).abs().max() < EXACT * max(1.0, value.abs().max())
    assert not any(isinstance(module, _BatchNorm) for module in deployed.modules())
    assert any(isinstance(module, _BatchNorm) for module in network.modules())
    assert not any(p.requires_grad for p in deployed.parameters())


@pytest.mark.parametrize("kind", [RepConv, SepRepConv])
def test_merged_chains_are_exact_at_the_border(kind: type[RepConv | SepRepConv]) -> None:
    chain = randomise(kind(6, 10))
    merged = merge_rep_conv(chain) if isinstance(chain, RepConv) else merge_sep_rep_conv(chain)
    assert (merged.kernel_size, merged.padding, merged.groups) == ((3, 3), (1, 1), 1)
    x = torch.randint(0, 5, (2, 6, 7, 5)).double()
    error = (merged(x) - chain(x)).abs()
    assert error.max() < EXACT
    border = torch.ones(7, 5, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert error[..., border].max() < EXACT


@pytest.mark.parametrize("kind", [RepConv, SepRepConv])
def test_a_border_of_zeros_would_not_merge(kind: type[RepConv | SepRepConv]) -> None:
    chain = randomise(kind(6, 10))
    merged = merge_rep_conv(chain) if isinstance(chain, RepConv) else merge_sep_rep_conv(chain)
    chain.pad_bn.register_forward_hook(lambda pad, _, y: F.pad(y[:, :, 1:-1, 1:-1], (1, 1, 1, 1)))
    x = torch.randint(0, 5, (2, 6, 7, 5)).double()
    error = (merged(x) - chain(x)).abs()
    assert error[:, :, 1:-1, 1:-1].max() < EXACT
    assert error[:, :, 0].max() > 1e-3
    assert error[:, :, :, -1].max() > 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_fold_keeps_stride_groups_and_bias(bias: bool) -> None:
    conv, bn = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=bias).double(), randomise(nn.BatchNorm2d(8))
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    folded = fold_bn(conv, bn)
    assert (folded(x) - bn(conv(x))).abs().max() < EXACT
    assert folded.weight.dtype == torch.float64
    assert fold_bn(conv.float(), bn).weight.dtype == torch.float32


def test_what_is_not_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot fold GroupNorm"):
        affine(nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match="running statistics"):
        affine(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="Sequential has batch norms that no convolution takes: 0"):
        deploy(nn.Sequential(nn.BatchNorm2d(4)))


def unit(channels: int) -> SpikingUnit:
    return SpikingUnit(nn.BatchNorm2d(channels), build_neuron(NeuronConfig()), timesteps=1)


class Stacks(nn.Module):
    """Plain stacks, as a network from outside has them. The unit and the first stack are each used twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = unit(4)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.again = self.first
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), shared)
        self.third = nn.Sequential(nn.Conv2d(4, 4, 1), shared)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images) + self.again(images.flip(3))
        x = self.second(x).flatten(0, 1)
        return x + self.third(x).flatten(0, 1)


def test_plain_stacks_are_folded() -> None:
    network = randomise(Stacks())
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    deployed = deploy(network)
    expected, output = network(images), deployed(images)
    assert 0 < expected.mean() < 2
    assert torch.equal(output, expected)
    assert deployed.first is deployed.again
    assert not any(isinstance(module, _BatchNorm) for module in deployed.modules())
    assert isinstance(network.second[1].bn, nn.BatchNorm2d)
    assert [layer.bias is None for layer in (network.first[0], deployed.first[0], deployed.third[0])] == [
        True,
        False,
        False,
    ]
    assert torch.equal(deploy(deployed)(images), expected)


class Branching(nn.Sequential):
    """Its convolution's output goes elsewhere too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return y + self[1](y)


@pytest.mark.parametrize(
    "network",
    [
        Branching(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)),
        nn.Sequential(nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU(), unit(3))),
    ],
)
def test_batch_norms_that_do_not_follow_a_convolution_are_refused(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"has batch norms that no convolution takes: [012](\.1\.bn)?; add"):
        deploy(network)


def test_a_chain_without_a_last_convolution_takes_no_batch_norm() -> None:
    with pytest.raises(ValueError, match="ReLU takes no batch norm"):
        deploy(ConvNorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match="Identity takes no batch norm"):
        fold_unit(nn.Identity(), unit(3))


def test_every_neuron_feeds_one_convolution_with_a_bias() -> None:
    deployed = deploy(build_model(model_config("spike_yolo_s", **YOLO)))
    layers = [module for module in deployed.modules() if isinstance(module, SpikeConv)]
    assert len(layers) == sum(isinstance(module, SN) for module in deployed.modules())
    assert all(isinstance(layer.conv, nn.Conv2d) and layer.conv.bias is not None for layer in layers)
    assert all(isinstance(layer.bn, nn.Identity) for layer in layers)


def test_neurons_stay_inside_chains_that_cannot_merge() -> None:
    plan = Plan(NeuronConfig(kind="ilif"), 1)
    layer = deploy(SpikeConv(plan, SpikingRepConv(plan, 4, 8), nn.BatchNorm2d(8)))
    assert isinstance(layer.conv, SpikingRepConv)
    assert [layer.conv.first.padding, layer.conv.first.bias is None, layer.conv.last.bias is None] == [
        (1, 1),
        False,
        False,
    ]


def operations(network: nn.Module, side: int) -> int:
    """Multiply-accumulates of the convolutions, without those that make the border of a padded chain."""
    grids = {(side // stride, side // stride) for stride in (4, 8, 16, 32)}
    total = 0

    def count(conv: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        height, width = output.shape[2:]
        if (height, width) not in grids:
            height, width = height - 2, width - 2
            assert (height, width) in grids
        total += output.shape[1] * height * width * conv.get_parameter("weight")[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network(torch.empty(1, 3, side, side, device="meta"))
    return total


@pytest.mark.parametrize(
    ("name", "factored", "merged", "weights"),
    [
        ("spike_yolo_n", 34.45, 59_291_443_200, 34.49),
        ("spike_yolo_s", 60.31, 104_514_355_200, 60.93),
        ("spike_yolo_m", 124.97, 217_295_360_000, 135.83),
        ("spike_yolo_l", 179.10, 312_101_068_800, 195.24),
    ],
)
def test_published_operations_and_weights(name: str, factored: float, merged: int, weights: float) -> None:
    with torch.device("meta"):
        network = build_model(model_config(name)).eval()
    deployed = deploy(network)
    assert sum(p.numel() for p in deployed.parameters()) / 1e6 == pytest.approx(weights, abs=0.006)
    assert operations(deployed, 640) == merged
    assert operations(network, 640) / 1e9 == pytest.approx(factored, abs=0.006)
    assert operations(deploy(network, merge=False), 640) / 1e9 == pytest.approx(factored, abs=0.006)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_a_folded_convolution_pads_as_before(mode: str) -> None:
    network = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4)))
    images = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    assert (network(images) - deploy(network)(images)).abs().max() < EXACT


def test_a_module_under_two_names_of_one_parent_is_deployed_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = RepConv(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(self.one(x))
            return y

    network = randomise(Twice())
    deployed = deploy(network)
    assert deployed.one is deployed.two
    images = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    assert (network(images) - deployed(images)).abs().max() < EXACT
