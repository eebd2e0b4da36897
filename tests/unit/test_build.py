"""Every model of the list: it runs, learns, fires, has the shapes it declares, survives a file and is what it says."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spikefleet_models.build import ModelConfig, build_model, list_models, model_config
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.neurons import NeuronConfig
from spikefleet_models.spiking_unit import use_implementation

SMALL = {"width": 0.25, "num_classes": 6}


def small(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = build_model(model_config(name, **SMALL))
    return model, torch.randn(8, model.config.in_channels, 16, 16)


def train_once(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(images)
    F.cross_entropy(logits, torch.arange(len(images)) % 6).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", list_models())
def test_forward_and_backward(name: str) -> None:
    model, images = small(name)
    logits, gradients = train_once(model, images)
    assert logits.shape == (8, 6)
    assert logits.isfinite().all()
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    silent = [key for key, gradient in gradients.items() if not gradient.any()]
    assert not silent


@pytest.mark.parametrize("name", list_models())
def test_declared_shapes_are_real(name: str) -> None:
    model, images = small(name)
    config = model.config
    outputs = model.forward_features(images)
    assert [output.shape[2] for output in outputs] == list(config.stage_channels)
    assert all(output.shape[:2] == (model.timesteps, 8) for output in outputs)
    assert [output.shape[-1] for output in outputs] == [max(1, 16 // 2**stage) for stage in range(len(outputs))]


@pytest.mark.parametrize("name", list_models())
def test_every_layer_can_fire(name: str) -> None:
    model, images = small(name)
    with SpikeMonitor(model) as monitor:
        model(images)
    rates = [row["rate"] for row in monitor.table()]
    assert (not rates) == (model.config.connection == "ann")
    assert all(0 < rate < 1 for rate in rates)


@pytest.mark.parametrize("name", list_models())
def test_state_dict_survives_safetensors(name: str, tmp_path: Path) -> None:
    model, images = small(name)
    model(images)  # moves the running statistics
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    other = build_model(model.config)
    with torch.no_grad():
        assert not torch.equal(model.eval()(images), other.eval()(images))
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(model(images), other(images))


@pytest.mark.parametrize("name", list_models())
def test_lean_equals_reference(name: str) -> None:
    lean, images = small(name)
    reference = copy.deepcopy(lean)
    use_implementation(reference, "reference")
    logits, gradients = train_once(lean, images)
    expected_logits, expected = train_once(reference, images)
    assert torch.equal(logits, expected_logits)
    for key, gradient in expected.items():
        assert (gradients[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key
    for key, buffer in reference.named_buffers():
        assert torch.equal(dict(lean.named_buffers())[key], buffer), key


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
    assert model_config("sg_resnet18").decoder == "asd"
    assert model_config("sg_resnet50").decoder == "rate"
    assert model_config("sew_resnet18").connection == "add"
    assert model_config("sg_resnet34", timesteps=2, stem="imagenet").timesteps == 2


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'sg_resnet19'; did you mean sg_resnet1"):
        model_config("sg_resnet19")
    with pytest.raises(ValueError, match="timestep"):
        model_config("sg_resnet18", timestep=2)


def test_configuration_round_trips_as_json() -> None:
    config = model_config("sg_resnet18", neuron={"kind": "plif"}, width=0.5)
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_same_seed_same_network() -> None:
    first, second = small("sg_resnet_tiny")[0], small("sg_resnet_tiny")[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
