"""Every model of the list: it runs, learns, fires, has the shapes it declares, survives a file and is what it says."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spikefleet_models import AnyModelConfig, build_model, list_models, model_config
from spikefleet_models.detection import Objects
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.kernels import CpuForm
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.spiking_unit import use_implementation
from support.cpu_forms import assert_ran, chosen_form

SMALL = {
    "sg_resnet": {"width": 0.25},
    "spike_yolo": {"width": 0.0625, "depth": 0.1, "stem_stride": 2, "box_channels": 16},
    "spiking_yolov8": {"width": 0.0625, "depth": 0.1, "box_channels": 16},
    "retinanet": {"backbone": {"width": 0.25, "asd_channel_reduction": 4}, "fpn_channels": 16},
    "seven_b_net": {"channels": (8, 8, 16), "asd_channel_reduction": 4, "timesteps": 4},
    "small_event_net": {"channels": (8, 12), "grid": 2, "timesteps": 4},
}
CLASSIFIERS = [name for name in list_models() if model_config(name).task == "classification"]
DETECTORS = [name for name in list_models() if name not in CLASSIFIERS]
# The sizes of SpikeYOLO are one network here.
SMALL_NETWORKS = [*CLASSIFIERS, *(name for name in DETECTORS if name not in list_models("spike_yolo_[snml]"))]
ONE_OF_EACH = ["spike_yolo_tiny", "spiking_yolov8_m", "retinanet_tiny"]


def small(name: str) -> tuple[nn.Module, Tensor]:
    # With seed 0 an attention decoder of retinanet_tiny starts with all its ReLUs off.
    torch.manual_seed(0 if name in CLASSIFIERS else 1)
    overrides = SMALL[model_config(name).family]
    model = build_model(model_config(name, **overrides, num_classes=6))
    batch, side = (8, 16) if name in CLASSIFIERS else (2, 64)
    return model, torch.randn(batch, model.config.in_channels, side, side)


def train_once(model: nn.Module, images: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    outputs = model(images)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
        F.cross_entropy(outputs[0], torch.arange(len(images)) % 6).backward()
    else:
        sum(output.square().mean() for output in outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return tuple(output.detach() for output in outputs), gradients


def outputs_equal(first: tuple[Tensor, ...] | Tensor, second: tuple[Tensor, ...] | Tensor) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_forward_and_backward(name: str) -> None:
    model, images = small(name)
    outputs, gradients = train_once(model, images)
    if name in CLASSIFIERS:
        assert outputs[0].shape == (8, 6)
    else:
        assert [output.shape[2:] for output in outputs] == [(-(-64 // s), -(-64 // s)) for s in model.config.strides]
    assert all(output.isfinite().all() for output in outputs)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    silent = [key for key, gradient in gradients.items() if not gradient.any()]
    assert not silent


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if model_config(name).family == "sg_resnet"])
def test_declared_shapes_are_real(name: str) -> None:
    model, images = small(name)
    config = model.config
    outputs = model.forward_features(images)
    assert [output.shape[2] for output in outputs] == list(config.stage_channels)
    assert all(output.shape[:2] == (model.timesteps, 8) for output in outputs)
    assert [output.shape[-1] for output in outputs] == [max(1, 16 // 2**stage) for stage in range(len(outputs))]


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_every_layer_can_fire(name: str) -> None:
    model, images = small(name)
    with SpikeMonitor(model) as monitor:
        model(images)
    rates = [row["rate"] for row in monitor.table()]
    assert (not rates) == ("ann" in name or "resnet" in name.removeprefix("retinanet_").split("_")[0])
    assert all(0 < rate < 1 for rate in rates)


@pytest.mark.parametrize("name", [*CLASSIFIERS, *ONE_OF_EACH])
def test_state_dict_survives_safetensors(name: str, tmp_path: Path) -> None:
    model, images = small(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # else SpikeYOLO's statistics move so little that nothing fires in evaluation
    with torch.no_grad():
        model(images)  # moves the running statistics
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        torch.manual_seed(1)
        other = build_model(model.config)
        assert not outputs_equal(model.eval()(images), other.eval()(images))
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert outputs_equal(model(images), other(images))


@pytest.mark.parametrize("form", ["lean", "native"])
@pytest.mark.parametrize("name", [*CLASSIFIERS, "retinanet_tiny"])
def test_fused_forms_equal_the_reference(name: str, form: CpuForm) -> None:
    fused, images = small(name)
    reference = copy.deepcopy(fused)
    use_implementation(reference, "reference")
    with chosen_form(form) as ran:
        outputs, gradients = train_once(fused, images)
    if spiking_nodes(fused):
        assert_ran(form, ran)
    expected_outputs, expected = train_once(reference, images)
    assert outputs_equal(outputs, expected_outputs)
    for key, gradient in expected.items():
        assert (gradients[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key
    for key, buffer in reference.named_buffers():
        assert torch.equal(dict(fused.named_buffers())[key], buffer), key


@pytest.mark.parametrize("kind", ["lif", "plif"])
def test_other_neurons_train(kind: str) -> None:
    torch.manual_seed(0)
    model = build_model(model_config("sg_resnet_tiny", neuron=NeuronConfig(kind=kind)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    images, targets = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_names_and_patterns() -> None:
    assert list_models("sg_resnet??") == ["sg_resnet10", "sg_resnet18", "sg_resnet34", "sg_resnet50"]
    assert list_models("nothing*") == []
    assert {"sew_resnet50", "spiking_resnet18", "resnet34", "sg_resnet_tiny"} <= set(list_models())


def test_presets_are_the_papers() -> None:
    assert model_config("sg_resnet18").decoder == "asd"  # type: ignore[attr-defined]
    assert model_config("sg_resnet50").decoder == "rate"  # type: ignore[attr-defined]
    assert model_config("sew_resnet18").connection == "add"  # type: ignore[attr-defined]
    assert model_config("sg_resnet34", timesteps=2, stem="imagenet").timesteps == 2


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'sg_resnet19'; did you mean sg_resnet1"):
        model_config("sg_resnet19")
    with pytest.raises(ValueError, match="timestep"):
        model_config("sg_resnet18", timestep=2)


@pytest.mark.parametrize("name", list_models())
def test_configuration_round_trips_as_json(name: str) -> None:
    config = model_config(name, **SMALL[model_config(name).family])
    assert TypeAdapter(AnyModelConfig).validate_json(config.model_dump_json()) == config


def test_family_selects_the_configuration_and_defaults_to_sg_resnet() -> None:
    adapter = TypeAdapter(AnyModelConfig)
    assert adapter.validate_python({"stages": [1, 1]}).family == "sg_resnet"
    assert adapter.validate_python({"family": "spike_yolo", "width": 0.25}).width == 0.25  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="family must be one of sg_resnet, spike_yolo"):
        adapter.validate_python({"family": "yolo"})
    with pytest.raises(ValidationError, match="stem_stride"):
        adapter.validate_python({"stages": [1, 1], "stem_stride": 2})


def test_a_mapping_overrides_fields_inside_a_field() -> None:
    config = model_config("retinanet_sg_resnet34", backbone={"timesteps": 2})
    assert config.backbone.stages == (3, 4, 6, 3)  # type: ignore[attr-defined]
    assert config.timesteps == 2


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_criteria_fit_their_networks(name: str) -> None:
    model, images = small(name)
    criterion = model.config.build_criterion()
    objects = [
        Objects(torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([5])),
        Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    ]
    loss = criterion.loss(model(images), objects, (64, 64))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert len(criterion.detect(model.eval()(images), (64, 64))) == 2


def test_networks_without_a_criterion_say_why() -> None:
    with pytest.raises(ValueError, match="family=sg_resnet classifies images"):
        model_config("sg_resnet18").build_criterion()
    with pytest.raises(ValueError, match="head='anchor' has no published loss"):
        model_config("spike_yolo_s_anchor").build_criterion()


def test_same_seed_same_network() -> None:
    first, second = small("sg_resnet_tiny")[0], small("sg_resnet_tiny")[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
