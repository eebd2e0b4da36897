"""Energy cards: published counts, a network by hand, SpikingJelly's counter, what is spikes and what is not."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter
from torch import Tensor, nn

from spikefleet_models import build_model, model_config
from spikefleet_models.energy import (
    EnergyCard,
    energy_at_rates,
    energy_card,
)
from spikefleet_models.energy_constants import CONSTANTS, EnergyConstants
from spikefleet_models.neurons import ILIF
from spikefleet_models.reparam import deploy
from spikefleet_models.sg_resnet_config import SGResNetConfig
from spikefleet_models.spike_driven import spike_driven

FIXTURES = Path(__file__).parents[1] / "fixtures"


def bare(name: str, **overrides: object) -> nn.Module:
    with torch.device("meta"):
        return build_model(model_config(name, **overrides))


def bare_twin(network: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return build_model(network.config.twin())


def settled(network: nn.Module, images: Tensor) -> nn.Module:
    """fp64, in eval mode, with the statistics of the images, so that layers fire."""
    network = network.double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(images)
    return network.eval()


def tiny(name: str = "sg_resnet18", size: int = 16, **overrides: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name.startswith(("sg", "sew", "spiking_resnet", "resnet")):
        overrides = {"width": 0.25, "stages": (2, 2), "num_classes": 5, **overrides}
    network = build_model(model_config(name, **overrides))
    images = torch.rand(4, network.config.in_channels, size, size, dtype=torch.float64)
    return settled(network, images), images


def rows(card: EnergyCard) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["layer"], row["operation"]): row for row in card.rows()}


# ---------------------------------------------------------------------------------------------- published counts


def test_resnet18_on_cifar100() -> None:
    with_shortcuts = energy_at_rates(bare("resnet18", num_classes=100), (32, 32), 0.0)
    assert with_shortcuts.macs == 555_417_600 + 51_200
    card = energy_at_rates(bare("resnet18", num_classes=100), (32, 32), 0.0, shortcuts=False)
    assert card.macs == card.dense == 549_177_344
    assert card.acs == 0
    assert card.energy_mj * 1e9 == pytest.approx(1.702e9, rel=5e-4)
    assert card.twin is None


def test_sg_resnet18_on_cifar100() -> None:
    card = energy_at_rates(bare("sg_resnet18", num_classes=100), (32, 32), 0.159, shortcuts=False)
    stem, classifier = 1_769_472, 51_200
    # Channel attention (twice), spatial and temporal attention, and the products of the first two with the features.
    asd = 65_536 + 1_568 + 32 + 2 * 8_192
    assert card.macs == stem + classifier + asd
    assert asd == pytest.approx(82_258, rel=0.02)  # what its energy of 2.55e5 pJ amounts to
    assert card.macs == pytest.approx(1.9e6, rel=0.02)
    # T = 4 times the 3x3 convolutions behind neurons, and the decoder's average of spikes with weights of steps.
    assert card.dense - card.macs == 4 * (549_126_144 - stem) + 4 * 512 * 16
    assert card.acs == pytest.approx(348.9e6, rel=0.005)
    assert card.energy_mj * 1e9 == pytest.approx(4.078e7, rel=0.005)
    assert card.twin is not None
    assert card.twin.macs == 549_177_344
    assert card.twin_ratio == pytest.approx(41.7, rel=0.005)
    assert card.under("fp32-45nm").twin_ratio == pytest.approx(7.8, rel=0.01)


@pytest.mark.parametrize(("size", "channels", "gmac"), [("n", 48, 59.29), ("s", 64, 104.514), ("l", 96, 312.10)])
def test_spike_yolo_merged(size: str, channels: int, gmac: float) -> None:
    card = energy_at_rates(bare(f"spike_yolo_{size}"), (640, 640), 0.365, "fp32-45nm", twin_form=None)
    assert card.form == "merged"
    assert card.dense / 1e9 == pytest.approx(gmac, rel=1e-4)
    # Behind the stem, nothing but spikes.
    assert card.macs == channels * 3 * 49 * 160 * 160
    assert [layer.layer for layer in card.layers if not layer.spike_fed] == ["stem.conv"]
    if size == "s":
        assert card.dense == 104_514_355_200
        # The 89 released rates are not public in text; their mean, weighted by operations, is 0.365.
        assert card.energy_mj == pytest.approx(35.38, rel=0.002)


def test_spike_yolo_forms_and_twin() -> None:
    network = bare("spike_yolo_s")
    merged = energy_at_rates(network, (640, 640), 0.365, "fp32-45nm", twin_form="merged")
    assert merged.twin_energy_mj == pytest.approx(480.8, rel=1e-3)
    as_built = energy_at_rates(network, (640, 640), 0.365, "fp32-45nm", form="as_built")
    assert as_built.twin == dataclasses.replace(merged.twin, form="as_built", macs=as_built.dense)  # type: ignore[type-var]
    # 60.31 G is published for the outputs proper; the chains also compute the border that they pad.
    border = sum(
        layer.dense * (1 - (side / (side + 2)) ** 2)
        for layer in as_built.layers
        if layer.layer.endswith("conv.pointwise")
        for side in [round((layer.dense / network.get_submodule(layer.layer).weight.numel()) ** 0.5) - 2]
    )
    assert (as_built.dense - border) / 1e9 == pytest.approx(60.31, abs=0.005)
    # Inside a chain values are real, so that there is more to multiply.
    factored = energy_at_rates(network, (640, 640), 0.365, "fp32-45nm", form="factored", twin_form=None)
    assert merged.macs < factored.macs < as_built.macs < as_built.dense < merged.dense


def test_spiking_retinanet_multiplies_behind_its_backbone() -> None:
    card = energy_at_rates(bare("retinanet_sg_resnet18"), (640, 640), 0.1)
    kinds = {row["layer"].split(".")[0]: row["input"] for row in card.rows() if row["layer"] != "backbone.stem.conv"}
    assert kinds == {
        "backbone": "spikes",
        "decoders": "real",
        "pyramid": "real",
        "classification": "real",
        "regression": "real",
    }
    assert card.twin is not None
    assert card.twin.macs == energy_at_rates(bare("retinanet_resnet18"), (640, 640), 0.0).macs
    # The head of a level costs what its cells cost: P3 to P7 of a 640 image.
    cells = sum(side**2 for side in (80, 40, 20, 10, 5))
    assert rows(card)["classification.cls_logits", "convolution"]["dense"] == cells * 256 * 9 * 80 * 9


# --------------------------------------------------------------------------------------------------- by hand


class TwoLayers(nn.Module):
    """Image -> 1x1 -> I-LIF without leak, T = 2 -> 3x3 on [2 * B, 2, 2, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.timesteps = 2
        self.first = nn.Conv2d(1, 2, 1, bias=False)
        self.first.weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        self.node = ILIF(bound=4, leak=0.0)
        self.second = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        currents = self.first(images)
        return self.second(self.node(currents.expand(2, *currents.shape)).flatten(0, 1))


def test_two_layers_by_hand() -> None:
    # Emitted in each step: 0 1 2 3 and 0 2 4 4, which clips 6.
    images = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 1, 2, 2)
    card = energy_card(TwoLayers(), [images], EnergyConstants("mine", 1, 2.0, 0.5, "a test"))
    assert (card.timesteps, card.bound, card.images, card.form, card.twin) == (2, 4, 1, "as_built", None)
    first, second = card.rows()
    assert (first["dense"], first["macs"], first["acs"], first["rate"]) == (8, 8, 0, None)
    assert second["dense"] == 2 * 4 * 3 * 2 * 9
    assert second["mean_input"] == 2.0
    assert second["rate"] == 0.5
    assert second["acs"] == card.acs == 2 * 432
    # A pixel of a 2x2 map lies under 4 positions of the kernel, of 3 channels each.
    assert card.synaptic_operations == 2 * 16 * 12
    assert card.energy_mj == (8 * 2.0 + 864 * 0.5) / 1e9
    assert first["share"] + second["share"] == pytest.approx(1.0)


def test_integers_that_are_no_spikes_multiply() -> None:
    class Averages(TwoLayers):
        def forward(self, images: Tensor) -> Tensor:
            currents = self.first(images)
            return self.second(self.node(currents.expand(2, *currents.shape)).mean(0))

    images = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 1, 2, 2)
    card = energy_card(Averages(), [images])
    assert [row["input"] for row in card.rows()] == ["real", "real"]
    assert card.mean_input is None
    silent = energy_card(Averages(), [torch.zeros(1, 1, 2, 2)])
    assert silent.macs == card.macs == 8 + 4 * 3 * 2 * 9


# ------------------------------------------------------------------------------------------- SpikingJelly's count


def spikingjelly_counts(network: nn.Module, images: Tensor) -> dict[str, int]:
    counter = SynOpCounter()
    with torch.no_grad(), DispatchCounterMode([counter]):
        network(images)
    prefix = f"{type(network).__name__}."
    return {
        name.removeprefix(prefix): total
        for name, record in counter.records.items()
        if name.startswith(prefix) and (total := sum(record.values()))
    }


@pytest.mark.parametrize("connection", ["iand", "add", "bsg"])
def test_synaptic_operations_agree_with_spikingjelly(connection: str) -> None:
    network, images = tiny("sew_resnet18", connection=connection)
    card = energy_card(network, [images], form="as_built")
    theirs = spikingjelly_counts(network, images)
    # SpikingJelly recognises spikes by their values, and counts nothing on ADD's integers either.
    ours = {layer.layer: layer.synaptic_operations * len(images) for layer in card.layers if layer.spike_fed}
    assert len(ours) == {"iand": 9, "add": 5, "bsg": 9}[connection]
    assert {name: theirs[name] for name in ours} == pytest.approx(ours, rel=1e-12)
    convolutions = [name for name in theirs if any(name.startswith(layer) for layer in ours)]
    assert sum(theirs[name] for name in convolutions) == pytest.approx(card.synaptic_operations * len(images))


# ------------------------------------------------------------------------------------- measured on real networks

MEMBERS: dict[str, dict[str, Any]] = {
    "sg_resnet18": {},
    "sew_resnet18": {},
    "spiking_resnet18": {},
    "retinanet_tiny": {"size": 32},
    "spike_yolo_tiny": {"size": 32, "timesteps": 2},
    "spiking_yolov8_m": {"size": 32, "width": 0.0625, "depth": 0.1},
}


@pytest.mark.parametrize("name", MEMBERS)
def test_batches_do_not_matter(name: str) -> None:
    network, images = tiny(name, **MEMBERS[name])

    def card(batches: Iterable[Tensor]) -> dict[str, Any]:
        return energy_card(network, batches, "fp32-45nm").to_dict()

    whole, split = card([images]), card(images.split([1, 2, 1]))
    assert whole["images"] == split["images"] == 4
    assert whole["totals"]["acs"] > 0
    assert whole["totals"] == pytest.approx(split["totals"], rel=1e-9)
    for one, other in zip(whole["rows"], split["rows"], strict=True):
        assert (one["layer"], one["dense"]) == (other["layer"], other["dense"])
        assert one["acs"] == pytest.approx(other["acs"], rel=1e-9)
    # Negative control: other images do matter.
    assert card([images[:1]])["totals"]["acs"] != pytest.approx(whole["totals"]["acs"], rel=1e-9)


def test_rates_are_the_means_that_layers_receive() -> None:
    network, images = tiny("spike_yolo_tiny", size=32, timesteps=2)
    deployed = deploy(network)
    seen: dict[str, float] = {}
    for name, module in deployed.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, inputs, y, name=name: seen.update({name: inputs[0].mean().item()}))
    with torch.no_grad():
        deployed(images)
    card = energy_card(network, [images])
    assert card.bound == 4
    found = rows(card)
    assert len(found) == len(seen)
    for (layer, _), row in found.items():
        if row["input"] == "spikes":
            assert row["mean_input"] == pytest.approx(seen[layer])
            assert row["rate"] == pytest.approx(seen[layer] / 4)
    assert found["stem.conv", "convolution"]["input"] == "real"
    # What was measured, put in as given rates, gives the same energy.
    given = {layer: row["mean_input"] for (layer, _), row in found.items() if row["input"] == "spikes"}
    assert energy_at_rates(network, (32, 32), given).energy_mj == pytest.approx(card.energy_mj)


def test_binary_form_costs_the_same() -> None:
    network, images = tiny("spike_yolo_tiny", size=32, timesteps=2)
    integer = energy_card(network, [images])
    binary = energy_card(spike_driven(deploy(network)), [images])
    assert binary.acs == pytest.approx(integer.acs)
    assert binary.synaptic_operations == pytest.approx(integer.synaptic_operations)
    assert binary.macs == integer.macs
    assert {row["bound"] for row in binary.rows() if row["input"] == "spikes"} == {1}


def test_frames_pass_the_first_layer_every_step() -> None:
    network, images = tiny()
    frames = images.expand(4, *images.shape).round()
    still, moving = (rows(energy_card(network, [x]))["stem.conv", "convolution"] for x in (images, frames))
    assert moving["macs"] == 4 * still["macs"]


def test_merging_keeps_the_rates_of_a_residual_network() -> None:
    network, images = tiny()
    merged, as_built = (energy_card(network, [images], form=form) for form in ("merged", "as_built"))
    assert merged.acs == pytest.approx(as_built.acs)
    assert merged.macs == as_built.macs


def test_the_network_is_left_alone() -> None:
    network, images = tiny()
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    card = energy_card(network, [images], form="as_built")
    assert card.network == "SGResNet"
    assert all(module.training and not module._forward_hooks for module in network.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


# ------------------------------------------------------------------------------------------------- card and errors


def test_card_survives_json() -> None:
    network, images = tiny()
    card = energy_card(network, [images])
    plain = json.loads(json.dumps(card.to_dict()))
    assert EnergyCard.from_dict(plain) == card
    assert plain["totals"]["energy_mj"] == card.energy_mj
    assert plain["constants"]["name"] == "int32-45nm"
    assert (plain["form"], plain["shortcuts"], plain["twin"]["form"]) == ("merged", True, "as_built")
    assert "first layer multiplies" in plain["conventions"][0]
    given = energy_at_rates(network, (16, 16), 0.5)
    assert given.synaptic_operations is None
    assert EnergyCard.from_dict(json.loads(json.dumps(given.to_dict()))) == given


@pytest.mark.parametrize("change", [{"version": 0}, {"layers": [{"name": "x"}]}, {"timestep": 4}, {"image_size": []}])
def test_foreign_cards_are_refused(change: dict[str, object]) -> None:
    plain = energy_at_rates(bare("sg_resnet_tiny"), (8, 8), 0.1).to_dict() | change
    with pytest.raises(ValueError, match="energy card"):
        EnergyCard.from_dict(plain)


def test_cards_of_earlier_releases_are_read() -> None:
    card = energy_at_rates(bare("sg_resnet_tiny"), (8, 8), 0.1)
    plain = card.to_dict()
    earlier = {"pictures" if name == "images" else name: value for name, value in plain.items()}
    assert earlier != plain
    assert EnergyCard.from_dict(earlier) == card
    with pytest.raises(ValueError, match="energy card"):
        EnergyCard.from_dict(earlier | {"paintings": 1})
    registered = json.loads((FIXTURES / "format_1/model/artifacts/energy.json").read_text())
    assert EnergyCard.from_dict(registered).images == registered["pictures"] == 32


def test_constants_are_named() -> None:
    assert [(c.mac_pj, c.ac_pj) for c in CONSTANTS.values()] == [(3.1, 0.1), (4.6, 0.9), (4.6, 0.1)]
    with pytest.raises(
        ValueError,
        match=r"unknown energy constants '45nm', expected one of int32-45nm, fp32-45nm, int8-45nm; "
        r"did you mean 'int8-45nm'\?$",
    ):
        energy_at_rates(bare("sg_resnet_tiny"), (8, 8), 0.1, "45nm")


def test_wrong_rates_and_no_images_are_refused() -> None:
    network = bare("sg_resnet_tiny")
    with pytest.raises(ValueError, match=r"no rate for decoder; no rate for stages\.0"):
        energy_at_rates(network, (8, 8), {})
    with pytest.raises(ValueError, match=r"stem\.conv is not fed by spikes"):
        energy_at_rates(network, (8, 8), {"stem.conv": 1.0})
    with pytest.raises(ValueError, match="no images"):
        energy_card(tiny()[0], [])
    with pytest.raises(ValueError, match=r"no config\.in_channels"):
        energy_at_rates(TwoLayers(), (2, 2), 0.5)


def test_twins_of_all_families() -> None:
    assert SGResNetConfig().twin().connection == "ann"
    assert model_config("retinanet_tiny").twin().backbone.connection == "ann"
    assert model_config("spike_yolo_tiny").twin().activation == "relu"
    assert model_config("spiking_yolov8_m").twin().activation == "relu"
    for name in ("sg_resnet_tiny", "retinanet_tiny", "spike_yolo_tiny"):
        network = bare(name)
        assert energy_at_rates(network, (32, 32), 0.1).twin is not None
        assert energy_at_rates(bare_twin(network), (32, 32), 0.1).twin is None


def test_the_twin_is_counted_on_the_images_that_were_measured() -> None:
    """Whichever came first: images of two sizes, and the mean of the cards of each alone."""
    torch.manual_seed(0)
    network = build_model(model_config("sg_resnet_tiny", timesteps=1)).eval()
    small, large = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 32, 8)
    alone = [energy_card(network, [images]) for images in (small, large)]
    both, turned = energy_card(network, [small, large]), energy_card(network, [large, small])
    assert both.twin is not None
    assert turned.twin is not None
    assert both.twin.macs == turned.twin.macs == sum(card.twin.macs for card in alone if card.twin) / 2
    assert both.dense == pytest.approx(sum(card.dense for card in alone) / 2)
