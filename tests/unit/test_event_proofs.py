"""Proof, deployment and energy on event frames: T x D slots, counts are analogue, binary frames are spikes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikefleet_models import build_model, model_config
from spikefleet_models.energy import EnergyCard, energy_at_rates, energy_card
from spikefleet_models.equivalence import check_equivalence, count_flips
from spikefleet_models.reparam import deploy
from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_models.spike_edges import Analogue, SpikeFed, layer_inputs

ILIF = {"kind": "ilif", "bound": 2}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("spike_yolo_tiny", {"in_channels": 2, "num_classes": 3, "timesteps": 4, "neuron": ILIF}, 32),
    ("seven_b_net_narrow", {"channels": (8, 8, 16), "asd_channel_reduction": 4, "timesteps": 4}, 16),
    ("small_event_net", {"timesteps": 4}, 17),
]
FIRST = {"spike_yolo_tiny": "stem.conv", "seven_b_net_narrow": "widenings.0.conv", "small_event_net": "layers.0.conv"}


def frames(side: int, binary: bool, steps: int = 4) -> Tensor:
    counts = torch.poisson(torch.full((steps, 2, 2, side, side), 0.6), torch.Generator().manual_seed(0))
    return counts.clamp(max=1) if binary else counts


def trained(name: str, fields: dict[str, Any], side: int) -> nn.Module:
    """In eval mode, with statistics of event frames, so that neurons fire."""
    torch.manual_seed(0)
    network = build_model(model_config(name, **fields))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(3):
            network(frames(side, binary=False))
    return network.eval()


# SpikeYOLO on binary frames is in test_event_certificates.py.
@pytest.mark.parametrize(("case", "binary"), [(0, False), (1, False), (1, True), (2, False), (2, True)])
def test_the_proof_on_event_frames(case: int, binary: bool) -> None:
    name, fields, side = CASES[case]
    steps = 4 if binary or name.startswith("seven") else 3  # attention has weights for the configured T alone
    network = trained(name, fields, side).double()
    proof = check_equivalence(deploy(network), frames(side, binary, steps), trained=network, binary_input=binary)
    assert proof.why is None
    assert proof.passed
    rows = {row.name: row for row in proof.layers}
    first = rows[FIRST[name]]
    if binary:
        assert (first.kind, first.timesteps, first.bound, first.binary) == ("spike-fed", steps, 1, True)
        assert 0.2 < (first.ones or 0.0) < 0.6
    else:
        assert (first.kind, first.reason) == ("analogue", "its input is the image")
    bound = 2 if "neuron" in fields else 1
    neurons = [row for row in proof.layers if row.kind == "neuron"]
    assert {(row.timesteps, row.bound) for row in neurons} == {(steps, bound)}


@pytest.mark.parametrize(("name", "fields", "side"), CASES[1:])
def test_a_changed_weight_of_the_first_layer_is_found(name: str, fields: dict[str, Any], side: int) -> None:
    network = trained(name, fields, side).double()
    deployed = deploy(network)
    with torch.no_grad():
        deployed.get_submodule(FIRST[name]).weight[0, 0, 0, 0] += 0.1
    proof = check_equivalence(deployed, frames(side, binary=True), trained=network, binary_input=True)
    assert not proof.passed
    assert FIRST[name] in (proof.why or "")


def test_counts_are_not_taken_for_binary_frames() -> None:
    name, fields, side = CASES[2]
    network = deploy(trained(name, fields, side))
    counts, binary = frames(side, binary=False), frames(side, binary=True)
    for check in (check_equivalence, count_flips):
        with pytest.raises(ValueError, match=r"binary_input: the frames hold \d, expected 0 and 1"):
            check(network, counts, binary_input=True)  # type: ignore[operator]
    with pytest.raises(ValueError, match="expected 0 and 1"):
        energy_card(network, [counts], binary_input=True)
    with pytest.raises(ValueError, match="expected event frames"):
        energy_card(network, [binary[0]], binary_input=True)
    # Frames that happen to hold 0 and 1 are an image until they are declared to be spikes.
    assert isinstance(layer_inputs(network, binary)["layers.0.conv"], Analogue)
    assert layer_inputs(network, binary, binary_input=True)["layers.0.conv"] == SpikeFed(("the input",), 4, 1)


class Scaled(nn.Module):
    """A network whose frames are scaled before its first layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.config = network.config

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x * 0.5)
        return y


def test_what_binary_frames_may_not_be_used_for() -> None:
    name, fields, side = CASES[2]
    network = Scaled(deploy(trained(name, fields, side)))
    binary = frames(side, binary=True)
    with pytest.raises(NotSpikeDrivenError, match="mul"):
        check_equivalence(network, binary, binary_input=True)
    assert check_equivalence(network, binary).passed  # an image may be scaled
    assert energy_card(network, [binary], binary_input=True).macs == energy_card(network, [binary]).macs > 0


@pytest.mark.parametrize(("name", "fields", "side"), CASES)
def test_binary_frames_cost_additions_alone(name: str, fields: dict[str, Any], side: int) -> None:
    network, binary = trained(name, fields, side), frames(side, binary=True)
    counted = energy_card(network, [binary])
    card = energy_card(network, [binary], binary_input=True)
    rows, before = ({row["layer"]: row for row in each.rows()} for each in (card, counted))
    first, earlier = rows.pop(FIRST[name]), before.pop(FIRST[name])
    assert (first["input"], first["macs"], first["bound"]) == ("spikes", 0.0, 1)
    assert (earlier["input"], earlier["acs"], earlier["macs"]) == ("real", 0.0, earlier["dense"])
    assert first["acs"] == pytest.approx(first["dense"] * binary.mean().item())
    assert first["dense"] == earlier["dense"]
    assert card.macs == counted.macs - earlier["dense"]
    assert [(r["macs"], r["acs"]) for r in rows.values()] == [(r["macs"], r["acs"]) for r in before.values()]
    assert EnergyCard.from_dict(card.to_dict()) == card
    assert (card.binary_input, counted.binary_input) == (True, False)


def test_frames_run_the_first_layer_at_each_step() -> None:
    name, fields, side = CASES[2]
    network = trained(name, fields, side)
    still = energy_at_rates(network, (side, side), 0.1)
    moving = energy_at_rates(network, (side, side), 0.1, timesteps=4)
    first = still.layers[0].dense
    assert moving.layers[0].dense == 4 * first
    assert moving.macs - still.macs == 3 * first
    assert energy_at_rates(network, (side, side), 0.1, timesteps=3).timesteps == 3
    measured = energy_card(network, [frames(side, binary=False, steps=3)])
    assert (measured.timesteps, measured.layers[0].dense) == (3, 3 * first)
    assert energy_card(network, [frames(side, binary=False)[0]]).timesteps == 4
    binary = energy_at_rates(network, (side, side), 0.1, timesteps=4, binary_input=True)
    assert binary.macs == moving.macs - 4 * first
    assert binary.acs == pytest.approx(moving.acs + 0.1 * 4 * first)
    assert moving.twin == still.twin  # the twin sees one frame
