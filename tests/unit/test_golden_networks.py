"""What seeds and folding gave when it was pinned: a refactoring moves neither initial nor deployed weights.

Bits of normal draws and of matrix products differ between processors. So initial weights are pinned by names, shapes
and the generator's state after the construction, all exact, and by a weighted sum within rounding; deployed weights
are pinned by their bits, on parameters whose sums and products are exact in fp64.
"""

import hashlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikefleet_models import build_model, model_config
from spikefleet_models.reparam import deploy

YOLO = {"width": 0.0625, "depth": 0.1, "stem_stride": 2, "box_channels": 16, "num_classes": 3}
YOLOV8 = {"width": 0.0625, "depth": 0.1, "num_classes": 3}
QUARTER = {"width": 0.25}
INITIAL: list[tuple[str, dict[str, Any], str, float]] = [
    ("sg_resnet_tiny", {}, "1413766c87a3eb0e", 24.2024389),
    ("sg_resnet18", {}, "6bf8ead88b80a573", -41.5037474),
    ("sew_resnet50", QUARTER, "9de4707ff3ac106b", 147.58804),
    ("resnet18", QUARTER, "33706388589cf7e0", -33.5924634),
    ("spike_yolo_tiny", {}, "4b77659042dcb887", 107.955708),
    ("spike_yolo_ann_tiny", {}, "4b77659042dcb887", 107.955708),
    ("spike_yolo_s_transformer", YOLO, "c3168d1346d1c5c9", 64.3654397),
    ("spike_yolo_s_no_rep", YOLO, "23db997ba390a81e", 70.3572904),
    ("spike_yolo_s_anchor", YOLO, "6af4a74b84fa0ec7", -29.918105),
    ("spiking_yolov8_m", YOLOV8, "cd5b6ba3e0bd2b28", -71.6180026),
    ("retinanet_tiny", {}, "0f6c2568c92eaff8", 78.398781),
]
DEPLOYED: list[tuple[str, dict[str, Any], str, str]] = [
    ("spike_yolo_s", YOLO, "545ca66372b9c0b7", "c3d298783a83ef24"),
    ("spike_yolo_s_no_rep", YOLO, "828de4fdfdb79084", "828de4fdfdb79084"),
    ("spike_yolo_s_transformer", YOLO, "d1379940a3f3499f", "24fb475b5e685755"),
    ("spiking_yolov8_m", YOLOV8, "213eb8202c98bf99", "213eb8202c98bf99"),
    ("sg_resnet18", QUARTER, "9223343e2bae53c6", "9223343e2bae53c6"),
    ("sg_resnet50", {"width": 0.125, "asd_channel_reduction": 4}, "6111091eef8bc443", "6111091eef8bc443"),
    ("spiking_resnet18", QUARTER, "7f45c191f4d9f542", "7f45c191f4d9f542"),
    ("resnet18", QUARTER, "7f45c191f4d9f542", "7f45c191f4d9f542"),
    ("retinanet_tiny", {"num_classes": 3}, "9428799f28574f9e", "9428799f28574f9e"),
]


def names_and_shapes(network: nn.Module) -> bytes:
    return repr([(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]).encode()


def weighted_sum(network: nn.Module) -> float:
    """Moves when any two values change places, whatever their tensors."""
    total, offset = 0.0, 0
    for tensor in network.state_dict().values():
        values = tensor.double().flatten()
        total += (values * torch.arange(offset, offset + len(values)).double().mul(0.1).cos()).sum().item()
        offset += len(values)
    return total


def fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256(names_and_shapes(network))
    digest.update(bytes(torch.get_rng_state().tolist()))
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(("name", "overrides", "digest", "total"), INITIAL)
def test_initial_weights(name: str, overrides: dict[str, Any], digest: str, total: float) -> None:
    torch.manual_seed(0)
    network = build_model(model_config(name, **overrides))
    assert fingerprint(network) == digest
    assert weighted_sum(network) == pytest.approx(total, rel=1e-5)


def test_initial_weights_move_with_seed_and_order_of_draws() -> None:
    name, _, digest, total = INITIAL[0]
    torch.manual_seed(1)
    other_seed = build_model(model_config(name))
    assert fingerprint(other_seed) != digest
    torch.manual_seed(0)
    network = build_model(model_config(name))
    first, second = (stage[0].convs[1].weight for stage in (network.stages[0], network.stages[1]))
    assert first[0, 0].shape == second[0, 0].shape
    with torch.no_grad():
        first[0, 0], second[0, 0] = second[0, 0].clone(), first[0, 0].clone()
    assert fingerprint(network) == digest
    assert weighted_sum(network) != pytest.approx(total, rel=1e-5)


def make_exact(network: nn.Module) -> nn.Module:
    """fp64 with small dyadic parameters and batch norms that divide by exactly 1."""
    torch.manual_seed(0)
    network = network.double().eval()
    for parameter in network.parameters():
        parameter.data = torch.randint(-4, 5, parameter.shape).double() / 8
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            mean, variance = module.running_mean, module.running_var
            assert isinstance(mean, Tensor)
            assert isinstance(variance, Tensor)
            mean.copy_(torch.randint(-4, 5, mean.shape).double() / 8)
            variance.fill_(1.0 - module.eps)
            assert bool((variance + module.eps == 1.0).all())
    return network


def bits(network: nn.Module) -> str:
    digest = hashlib.sha256(names_and_shapes(network))
    for tensor in network.state_dict().values():
        digest.update(repr([value + 0.0 for value in tensor.flatten().tolist()]).encode())  # without signs of zeros
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(("name", "overrides", "merged", "factored"), DEPLOYED)
def test_deployed_weights(name: str, overrides: dict[str, Any], merged: str, factored: str) -> None:
    network = make_exact(build_model(model_config(name, **overrides)))
    before = bits(network)
    assert (bits(deploy(network)), bits(deploy(network, merge=False))) == (merged, factored)
    assert bits(network) == before != merged


def test_deployed_weights_move_with_the_last_bit() -> None:
    name, overrides, merged, _ = DEPLOYED[0]
    deployed = deploy(make_exact(build_model(model_config(name, **overrides))))
    assert bits(deployed) == merged
    bias = next(parameter for key, parameter in deployed.named_parameters() if key.endswith("bias"))
    bias.data[0] = math.nextafter(bias[0].item(), math.inf)
    assert bits(deployed) != merged
