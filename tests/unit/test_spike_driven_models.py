"""The families of this package: spike-driven behind their stem, or refused with the reason."""

import pytest
import torch
from torch import Tensor, nn

from spikefleet_models import spike_driven
from spikefleet_models.equivalence import check_equivalence
from spikefleet_models.families import build_model, model_config
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron
from spikefleet_models.proof import EquivalenceProof
from spikefleet_models.reparam import deploy
from spikefleet_models.slots import NotSpikeDrivenError, SlotLayer


def layers_of(proof: EquivalenceProof, kind: str) -> list[str]:
    return [layer.name for layer in proof.layers if layer.kind == kind]


def randomise_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affines as training leaves them: none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(shape, generator=generator) * 0.5 + 0.1)
            with torch.no_grad():
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.3 + 0.3)
    return network.eval()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"connection": "bsg_star", "neuron": NeuronConfig(kind="lif")},
        {"connection": "post_add", "decoder": "rate", "neuron": NeuronConfig(kind="plif")},
        {"connection": "iand", "stem": "imagenet", "timesteps": 1},
        {"connection": "and", "block": "bottleneck", "neuron": NeuronConfig(kind="ilif", bound=1)},
    ],
)
def test_sg_resnets_pass_only_binary_spikes(fields: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = deploy(randomise_norms(build_model(model_config("sg_resnet_tiny", **fields))))
    proof = check_equivalence(network, torch.rand(2, 1, 32, 32))
    assert proof.failure is None
    assert proof.passed
    analogue = layers_of(proof, "analogue")
    assert analogue[0] == "stem.conv"
    assert not any(name.startswith("stages") for name in analogue)
    assert {layer.bound for layer in proof.layers} == {1, None}
    reasons = {layer.name: layer.reason for layer in proof.layers}
    assert reasons["stem.conv"] == "its input is the image"
    assert "computed from spikes by" in reasons["classifier"]


def test_sums_of_sew_resnet_are_refused() -> None:
    network = deploy(build_model(model_config("sg_resnet_tiny", connection="add")))
    with pytest.raises(NotSpikeDrivenError, match="gate add, not with binary events"):
        spike_driven.spike_driven(network)


def test_networks_without_spikes_are_refused() -> None:
    with pytest.raises(NotSpikeDrivenError, match="no spiking neurons"):
        spike_driven.spike_driven(build_model(model_config("resnet18", width=0.25)))
    with pytest.raises(ValueError, match=r"config\.in_channels"):
        spike_driven.spike_driven(nn.Sequential(build_neuron(NeuronConfig())))


def test_frames_of_events_run_one_sample_at_a_time() -> None:
    torch.manual_seed(0)
    network = deploy(randomise_norms(build_model(model_config("sg_resnet_tiny"))))
    proof = check_equivalence(network, torch.rand(4, 3, 1, 16, 16))
    assert proof.passed
    assert proof.images == 3


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"timesteps": 2, "neuron": NeuronConfig(kind="ilif", bound=8)},
        {"timesteps": 2, "reparameterise": False},
        {"low_block": "block2", "head": "anchor", "neuron": NeuronConfig(kind="ilif", leak=0.5, input_scale=0.5)},
    ],
)
def test_spike_yolo_is_spike_driven_behind_its_stem(fields: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = model_config("spike_yolo_tiny", **fields)
    network = deploy(randomise_norms(build_model(config)))
    proof = check_equivalence(network, torch.rand(1, 3, 64, 64))
    assert proof.failure is None
    assert proof.passed
    assert layers_of(proof, "analogue") == ["stem.conv"]
    assert len(layers_of(proof, "spike-fed")) == len(layers_of(proof, "neuron")) > 50
    for layer in proof.layers:
        if layer.kind == "spike-fed":
            assert (layer.timesteps, layer.bound) == (config.timesteps, config.neuron.bound)  # type: ignore[attr-defined]
            assert layer.headroom_bits >= 5
            assert 0 < layer.ones < 1


def test_spiking_yolov8_is_spike_driven_behind_its_stem() -> None:
    torch.manual_seed(0)
    network = deploy(randomise_norms(build_model(model_config("spiking_yolov8_m", width=0.05, depth=0.3))))
    proof = check_equivalence(network, torch.rand(1, 3, 64, 64))
    assert proof.passed
    assert layers_of(proof, "analogue") == ["stem.conv"]


def test_spike_yolo_with_a_batch_norm_in_every_slot_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm_in_every_slot(layer: SlotLayer, spikes: Tensor) -> Tensor:
        y = (layer._weigh(spikes, layer.weight) - 0.1) / 1.5
        y = y.unflatten(0, (layer.timesteps, layer.slots, -1)).sum(1).flatten(0, 1) * 1.5 + 0.1
        return y if layer.bias is None else y + layer.bias.view(layer._bias_shape)

    monkeypatch.setattr(SlotLayer, "forward", norm_in_every_slot)
    network = deploy(randomise_norms(build_model(model_config("spike_yolo_tiny"))))
    assert not check_equivalence(network, torch.rand(1, 3, 64, 64)).passed


@pytest.mark.parametrize("bound", [1, 4])
def test_chains_that_are_not_merged_are_refused(bound: int) -> None:
    network = build_model(model_config("spike_yolo_tiny", neuron=NeuronConfig(kind="ilif", bound=bound)))
    with pytest.raises(NotSpikeDrivenError, match=r"expand\.sn\.neuron depends on layer .*project\.conv\.1"):
        check_equivalence(deploy(network, merge=False), torch.rand(1, 3, 64, 64))
    assert check_equivalence(deploy(network), torch.rand(1, 3, 64, 64)).passed


@pytest.mark.parametrize(
    ("bound", "sentence"), [(4, r"\(D=4\) feeds bmm"), (1, r"project\.sn\.neuron .* operation bmm")]
)
def test_products_of_spikes_are_refused(bound: int, sentence: str) -> None:
    config = model_config("spike_yolo_s_transformer", width=0.0625, neuron=NeuronConfig(kind="ilif", bound=bound))
    network = deploy(build_model(config))
    with pytest.raises(NotSpikeDrivenError, match=sentence):
        spike_driven.spike_driven(network)


def test_batch_norms_that_are_not_folded_are_refused() -> None:
    network = build_model(model_config("sg_resnet_tiny")).eval()
    with pytest.raises(NotSpikeDrivenError, match=r"operation .*batch_norm in stages\.0\.0\.units\.0\.bn"):
        check_equivalence(network, torch.rand(1, 1, 16, 16))


def test_the_spiking_part_of_retinanet() -> None:
    torch.manual_seed(0)
    network = deploy(randomise_norms(build_model(model_config("retinanet_tiny"))))
    proof = check_equivalence(network, torch.rand(2, 3, 64, 64))
    assert proof.failure is None
    assert proof.passed
    analogue = layers_of(proof, "analogue")
    assert [name for name in analogue if name.startswith("backbone")] == ["backbone.stem.conv"]
    assert any(name.startswith("classification") for name in analogue)
    assert all(name.startswith("backbone.stages") for name in layers_of(proof, "spike-fed"))
