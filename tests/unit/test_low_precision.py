"""Weights in bf16 and int8: spikes stay exact, sums of int8 have the same bits in every form, rounding is said."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import conv2d

from spikefleet.certificates.spike_check import check_spikes
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.inference.prediction import predict_images
from spikefleet.inference.rounding import rounding_effect
from spikefleet.inference.trained_network import TrainedNetwork, evaluate_on_split, in_precision
from spikefleet.tasks import build_task
from spikefleet.training.evaluation import first_batches
from spikefleet_models import low_precision
from spikefleet_models.energy import EnergyCard, energy_card
from spikefleet_models.families import build_model, model_config
from spikefleet_models.low_precision import Bf16Layer, Int8Layer, compare_spikes, packed_weights, rounded
from spikefleet_models.reparam import deploy
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Store

YOLO: dict[str, Any] = {"num_classes": 3}
RESNET: dict[str, Any] = {"stages": (1,), "width": 0.125, "timesteps": 2, "asd_channel_reduction": 4}


def lively(name: str, **fields: Any) -> nn.Module:
    """A network whose neurons fire."""
    torch.manual_seed(0)
    network = build_model(model_config(name, **fields))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 1.0)
    return network.eval().requires_grad_(False)


def integers(bound: int, channels: int = 16, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(bound)
    drawn = torch.randint(0, bound + 1, (3, channels, 9, 7), generator=generator)
    return drawn.float().contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bound", [1, 4, 128, 255])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": 7, "padding": 3, "groups": 16},
    ],
)
def test_int8_sums_are_exact_in_every_form(
    geometry: dict[str, Any], bound: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, **geometry).requires_grad_(False)
    layer, x = Int8Layer(conv, bound), integers(bound, layout=layout)
    fast = layer(x)
    if torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported():
        assert layer._packed is not None, "the CPU's int8 convolution was not used"
    monkeypatch.setattr(low_precision, "_kernel_is_exact", lambda: False)
    assert torch.equal(fast, layer(x))
    exact = conv2d(x.double(), layer.weight.double(), None, conv.stride, conv.padding, 1, conv.groups)
    expected = exact.float() * layer.scale.view(-1, 1, 1)
    assert torch.equal(fast, expected if conv.bias is None else expected + conv.bias.view(-1, 1, 1))
    assert not torch.equal(fast, conv(x))  # weights are rounded
    assert (fast - conv(x)).abs().max() <= 0.5 * bound * layer.scale.max() * conv.weight[0].numel() * 1.001
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_kernel_that_adds_up_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = low_precision._convolve
    low_precision._kernel_is_exact.cache_clear()
    monkeypatch.setattr(low_precision, "_convolve", lambda *given: right(*given) * (1 + 2.0**-22))
    assert not low_precision._kernel_is_exact()
    low_precision._kernel_is_exact.cache_clear()


def test_channels_of_zeros_and_large_fan_ins_stay_exact() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5000, 3).requires_grad_(False)
    layer.weight[1] = 0.0
    layer.weight[2] = 1.0
    rows = torch.full((2, 5000), 255.0)
    found = Int8Layer(layer, 255)(rows)
    assert torch.equal(found[:, 1], layer.bias[1].expand(2))
    q = Int8Layer(layer, 255)
    assert torch.equal(found[:, 2], (torch.tensor(5000 * 255 * 127.0) * q.scale[2] + layer.bias[2]).expand(2))


@pytest.mark.parametrize(
    ("precision", "name", "fields", "real"),
    [
        ("int8", "spike_yolo_tiny", YOLO, ["stem.conv"]),
        ("bf16", "sg_resnet_tiny", RESNET, ["stem.conv", "classifier"]),
        ("int8", "sg_resnet_tiny", {**RESNET, "connection": "add", "decoder": "rate"}, ["stem.conv", "classifier"]),
    ],
)
def test_layers_that_spikes_feed_are_rounded_and_no_others(
    precision: Any, name: str, fields: dict[str, Any], real: list[str]
) -> None:
    network = lively(name, **fields)
    deployed = deploy(network)
    low = deploy(network, precision=precision)
    kept = [n for n, module in low.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [n for n in kept if "decoder" not in n] == [n for n in kept if n.startswith(tuple(real))]
    assert any(isinstance(module, Int8Layer | Bf16Layer) for module in low.modules())
    plain = rounded(deployed, precision)
    assert {type(module) for module in plain.modules()} == {type(module) for module in deployed.modules()}
    x = torch.rand(2, network.config.in_channels, 32, 32)  # type: ignore[union-attr]
    between = compare_spikes(plain, low, x)
    assert between.emitted > 1000
    assert between.share < (1e-3 if precision == "int8" else 0.15)  # bf16 rounds each layer's sum too
    assert 0 < compare_spikes(deployed, low, x).share < 0.3
    packed = packed_weights(deployed, precision)
    for layer_name, weight in packed.items():
        values = weight.values.float()
        if weight.scale is not None:
            values = values * weight.scale.view(-1, *[1] * (values.ndim - 1))
        assert torch.equal(values, plain.get_submodule(layer_name).weight)


def test_rounding_is_proved_in_fp64_as_it_is_served() -> None:
    """In fp64 both forms have the same rounded weights, so nothing but the order of sums differs."""
    deployed = deploy(lively("spike_yolo_tiny", **YOLO)).double()
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    plain, served = rounded(deployed, "int8"), low_precision.with_precision(deployed, "int8")
    for one, other in zip(plain(x), served(x), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)
    assert not torch.allclose(deployed(x)[0], served(x)[0], rtol=0, atol=1e-3)


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"spikes feed no layer of SGResNet.*use fp32"):
        deploy(lively("sg_resnet_tiny", **RESNET, connection="ann", decoder="rate"), precision="int8")
    with pytest.raises(ValueError, match="precision is 'int4', expected one of fp32, bf16, int8"):
        deploy(lively("sg_resnet_tiny", **RESNET), precision="int4")  # type: ignore[arg-type]
    network = lively("sg_resnet_tiny", **RESNET)
    with pytest.raises(ValueError, match="set form='merged'"):
        energy_card(network, [torch.rand(1, 1, 8, 8)], form="as_built", precision="int8")


@pytest.fixture(scope="module")
def digits(stores_dir: Path) -> tuple[TrainedNetwork, Path]:
    """A network that classifies digits a little: its classifier is fitted on drawn features."""
    config = load_config("digits", parse_overrides(["model.stages=[1,1]", "cluster.workers=0"]))
    torch.manual_seed(0)
    network = build_model(config.model).eval().requires_grad_(False)
    store = Store.open(stores_dir / "digits", verify=False)
    loader = BatchLoader(store.split("val"), config.data.transform, train=False)
    batch = next(first_batches(loader, 200, 1))
    features: list[Tensor] = []
    hook = network.get_submodule("classifier").register_forward_pre_hook(lambda _, args: features.append(args[0]))
    network(batch.images)
    hook.remove()
    assert isinstance(batch.targets, Tensor)
    wanted = torch.eye(10)[batch.targets]
    fit = torch.linalg.lstsq(torch.cat((features[0], torch.ones(len(wanted), 1)), 1), wanted).solution
    network.get_submodule("classifier").get_parameter("weight").copy_(fit[:-1].t())
    network.get_submodule("classifier").get_parameter("bias").copy_(fit[-1])
    return TrainedNetwork("drawn", network, config, DataSummary.of(store.manifest)), stores_dir


def test_evaluation_says_what_rounding_changes(digits: tuple[TrainedNetwork, Path]) -> None:
    trained, stores = digits
    console = Console(file=io.StringIO())
    low = in_precision(trained, "int8")
    assert low.precision == "int8"
    assert low.config.train.precision == "fp32"
    evaluation = evaluate_on_split(low, "test", stores, console)
    effect = rounding_effect(trained, evaluation, "test", stores, console, precision="int8")
    exact = evaluate_on_split(in_precision(trained, "fp32"), "test", stores, console)
    flips = sum(a.classes[0] != b.classes[0] for a, b in zip(evaluation.predictions, exact.predictions, strict=True))
    assert (effect.flipped, effect.samples) == (flips, len(exact.predictions))
    assert 0 < effect.spikes.differing < 0.2 * effect.spikes.emitted
    assert effect.metrics == trained.task.metrics(evaluation.predictions, evaluation.targets)
    assert effect.fp32 == trained.task.metrics(exact.predictions, exact.targets)
    points = 100 * (effect.metrics["top1"] - effect.fp32["top1"])
    assert f"weights in int8, against fp32: top1 {points:+.2f} points" in effect.sentence
    assert effect.to_dict()["answers_differ"] == flips
    worse = copy.deepcopy(trained.network)
    worse.get_submodule("classifier").get_parameter("weight").neg_()
    other = evaluate_on_split(TrainedNetwork("b", worse, trained.config, trained.data), "test", stores, console)
    assert rounding_effect(trained, other, "test", stores, console, precision="int8").flipped > effect.flipped
    image = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8).numpy()
    ((_, prediction),) = predict_images(low, [image])
    assert len(prediction.classes) == 5


def test_a_network_without_spikes_says_so_by_its_reference(digits: tuple[TrainedNetwork, Path]) -> None:
    trained, _ = digits
    twin = build_model(trained.config.model.twin())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="drawn: spikes feed no layer"):
        in_precision(TrainedNetwork("drawn", twin, trained.config, trained.data), "int8")


def test_the_proof_is_of_the_rounded_weights(
    digits: tuple[TrainedNetwork, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, stores = digits
    rows = Store.open(stores / "digits", verify=False).split("val")
    task = build_task(trained.config, trained.data)
    check = check_spikes(trained.network, task, trained.config, rows, images=8, measured=16, precision="int8")
    assert check.verdict == "proved", check.why
    assert check.rounding is not None
    assert 0 < check.rounding.differing < check.rounding.emitted
    assert [leg.name for leg in check.legs] == ["deployed", "binary", "metric"]
    assert "before weights are rounded to int8" in check.legs[0].says
    assert "with weights in int8" in check.legs[1].says
    assert check.to_dict()["precision"] == "int8"
    plain = check_spikes(trained.network, task, trained.config, rows, images=8, precision="fp32")
    assert plain.to_dict()["rounding"] is None
    assert plain.to_dict()["precision"] == "fp32"


def test_the_energy_card_says_the_precision() -> None:
    network = lively("sg_resnet_tiny", **RESNET)
    images = torch.rand(2, 1, 16, 16)
    exact = energy_card(network, [images], "fp32-45nm")
    card = energy_card(network, [images], "int8-45nm", precision="int8")
    assert (exact.precision, card.precision) == ("fp32", "int8")
    assert card.macs == exact.macs
    assert card.acs != exact.acs  # rounded weights move rates
    assert card.acs == pytest.approx(exact.acs, rel=0.2)
    assert card.energy_mj < exact.energy_mj
    assert EnergyCard.from_dict(card.to_dict()).precision == "int8"
    older = {key: value for key, value in exact.to_dict().items() if key != "precision"}
    assert EnergyCard.from_dict(older).precision == "fp32"
