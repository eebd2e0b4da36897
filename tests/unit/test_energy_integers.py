"""Layers on sums of spikes (SEW ResNet's ADD) cost multiplications; layers on binary spikes and on I-LIF's do not."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from spikefleet import plots
from spikefleet.cli import app
from spikefleet.config.recipes import load_config
from spikefleet.reproduction.results import Training
from spikefleet.reproduction.rows import energy_remark, network_metrics
from spikefleet.reproduction.table import load_table
from spikefleet_models import build_model, model_config
from spikefleet_models.energy import FED_BY_INTEGERS, EnergyCard, energy_at_rates, energy_card
from spikefleet_models.gates import Gate
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron
from spikefleet_models.reparam import deploy
from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_models.spike_edges import layer_inputs

ADD_FED = ("stages.0.1.convs.0", "stages.1.0.shortcut.conv", "stages.1.0.convs.0", "stages.1.1.convs.0")


def settled(connection: str, **overrides: Any) -> tuple[nn.Module, Tensor]:
    """A small residual network in eval mode, with the statistics of the images, so that layers fire."""
    torch.manual_seed(0)
    config = {"width": 0.25, "stages": (2, 2), "num_classes": 5, "decoder": "rate", **overrides}
    network = build_model(model_config("sg_resnet18", connection=connection, **config)).double()
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(images)
    return network.eval(), images


def counted_as_before(card: EnergyCard, means: dict[str, float]) -> dict[str, Any]:
    """The card as the first release wrote it: layers on sums of spikes as additions."""
    plain = json.loads(json.dumps(card.to_dict())) | {"version": 1}
    plain["pictures"] = plain.pop("images")
    for layer in plain["layers"]:
        if layer.pop("integer_fed"):
            additions = layer["dense"] * means[layer["layer"]]
            layer |= {"spike_fed": True, "accumulated": additions, "synaptic_operations": additions}
    return plain


def test_layers_behind_add_multiply_in_rows_totals_and_twin_ratio() -> None:
    network, images = settled("add")
    card = energy_card(network, [images], "fp32-45nm")
    assert card.integer_fed == ADD_FED
    found = {row["layer"]: row for row in card.rows()}
    for name, row in found.items():
        is_marked = name in ADD_FED
        assert (row["input"] == "integers") == is_marked
        assert row["remark"] == (FED_BY_INTEGERS if is_marked else "")
        if is_marked:
            assert row["macs"] == row["dense"] > 0
            assert row["acs"] == 0
            assert row["mean_input"] is row["rate"] is row["synaptic_operations"] is None
    # Bounds are what ADD sums up to: 1 spike of each neuron that an identity shortcut passes on.
    assert [found[name]["bound"] for name in ADD_FED] == [2, 3, 3, 2]
    assert found["stages.0.0.convs.0"]["input"] == found["stages.0.0.convs.1"]["input"] == "spikes"
    dense = sum(found[name]["dense"] for name in ADD_FED)
    assert card.integer_macs == dense
    assert card.macs == dense + found["stem.conv"]["macs"] + found["classifier"]["macs"]
    totals = card.to_dict()["totals"]
    assert totals["macs"] == card.macs
    assert totals["integer_macs"] == dense
    assert card.energy_mj == pytest.approx((card.macs * 4.6 + card.acs * 0.9) / 1e9)
    assert card.twin is not None
    assert card.twin_ratio == pytest.approx(card.twin.macs * 4.6 / (card.macs * 4.6 + card.acs * 0.9))


@pytest.mark.parametrize("connection", ["bsg", "bsg_star", "and", "iand", "post_add"])
def test_layers_behind_gates_and_currents_do_not(connection: str) -> None:
    """The negative controls: binary gates, and Spiking ResNet's identity shortcut, which ends in a current."""
    card = energy_card(*in_batches(settled(connection)))
    assert card.integer_fed == ()
    assert card.integer_macs == 0
    by_input = [row["input"] for row in card.rows()]
    assert by_input.count("spikes") == len(by_input) - 2
    assert [row["layer"] for row in card.rows() if row["input"] == "real"] == ["stem.conv", "classifier"]
    assert {row["remark"] for row in card.rows()} == {""}


def in_batches(settled: tuple[nn.Module, Tensor]) -> tuple[nn.Module, list[Tensor]]:
    return settled[0], [settled[1]]


def test_the_mark_is_where_the_proof_refuses_sums() -> None:
    for connection, refused in (("add", True), ("iand", False), ("post_add", False)):
        network, images = settled(connection)
        if refused:
            with pytest.raises(NotSpikeDrivenError, match=rf"layer {ADD_FED[0]} is fed with integers .* gate add"):
                layer_inputs(deploy(network), images[:1])
        else:
            layer_inputs(deploy(network), images[:1])
        assert bool(energy_card(network, [images]).integer_fed) == refused


@pytest.mark.parametrize("name", ["spike_yolo_tiny", "spiking_yolov8_m", "retinanet_tiny"])
def test_networks_of_ilif_and_of_binary_gates_have_no_such_layer(name: str) -> None:
    small = {"width": 0.0625, "depth": 0.1} if name == "spiking_yolov8_m" else {}
    with torch.device("meta"):
        network = build_model(model_config(name, **small))
    card = energy_at_rates(network, (32, 32), 0.1)
    assert card.integer_fed == ()
    assert name == "retinanet_tiny" or card.bound == 4


class Twice(nn.Module):
    """A gate whose two inputs are the same."""

    def __init__(self, name: Literal["add", "iand"]) -> None:
        super().__init__()
        self.gate = Gate(name)

    def forward(self, s: Tensor) -> Tensor:
        return self.gate(s, s)


class Joined(nn.Module):
    """Image -> convolution -> I-LIF -> `join` -> convolution."""

    def __init__(self, bound: int, join: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.neuron = build_neuron(NeuronConfig(kind="ilif", bound=bound))
        self.join = join

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.join(self.neuron(self.first(images).unsqueeze(0)).flatten(0, 1)))


@pytest.mark.parametrize(
    ("bound", "join", "fed_by"),
    [
        (4, lambda s: s, "spikes"),
        (1, lambda s: s, "spikes"),
        (4, lambda s: s + s, "integers"),
        (1, lambda s: s + s, "integers"),
        (1, Twice("add"), "integers"),
        (1, Twice("iand"), "spikes"),
        (1, lambda s: torch.cat((s + s, s), 1)[:, :3], "integers"),
        (1, lambda s: torch.max_pool2d(s + s, 2), "integers"),
        (1, lambda s: s + 1, "real"),
        (4, lambda s: s * 0.5, "real"),
    ],
)
def test_an_integer_of_a_neuron_is_spikes_and_a_sum_is_not(
    bound: int, join: Callable[[Tensor], Tensor], fed_by: str
) -> None:
    card = energy_card(Joined(bound, join).eval(), [torch.rand(2, 3, 4, 4) * 4])
    row = card.rows()[-1]
    assert row["input"] == fed_by
    assert (row["mean_input"] is not None) == (fed_by == "spikes")
    assert row["macs"] == (0 if fed_by == "spikes" else row["dense"])


def test_spikes_on_one_side_add_up_the_integers_on_the_other() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = build_neuron(NeuronConfig(kind="lif"))

        def forward(self, images: Tensor) -> Tensor:
            s = self.neuron(images.unsqueeze(0)).flatten(0, 1).flatten(0, 2)
            return s @ (s + s)

    (row,) = energy_card(Product().eval(), [torch.rand(1, 1, 4, 4) * 4]).rows()
    assert (row["input"], row["bound"], row["macs"]) == ("spikes", 1, 0)
    assert row["acs"] > 0


def test_rates_are_for_layers_on_spikes_alone() -> None:
    network, _ = settled("add")
    card = energy_at_rates(network, (16, 16), 0.2)
    assert card.integer_fed == ADD_FED
    assert card.macs == energy_card(network, [torch.rand(1, 3, 16, 16, dtype=torch.float64)]).macs
    with pytest.raises(ValueError, match=rf"{ADD_FED[0]} is fed by sums of spikes"):
        energy_at_rates(network, (16, 16), {ADD_FED[0]: 0.5})


def test_cards_of_the_first_release_are_read_with_the_mark() -> None:
    card = energy_card(*in_batches(settled("add")))
    earlier = counted_as_before(card, dict.fromkeys(ADD_FED, 0.5))
    assert EnergyCard.from_dict(earlier) == card
    # Of a network without ADD nothing changes, integers of I-LIF included.
    with torch.device("meta"):
        network = build_model(model_config("spike_yolo_tiny"))
    of_ilif = energy_at_rates(network, (32, 32), 0.5)
    read = EnergyCard.from_dict(counted_as_before(of_ilif, {}))
    assert read == of_ilif
    assert {layer.bound for layer in read.layers if layer.spike_fed} == {4}


def test_the_plot_has_a_colour_of_its_own_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[list[str]] = []
    monkeypatch.setattr(
        plots, "save", lambda figure, path: labels.append([t.get_text() for t in figure.axes[0].get_legend().texts])
    )
    for connection in ("add", "bsg"):
        plots.energy_bars(energy_card(*in_batches(settled(connection))).rows(), "", tmp_path / "energy.png")
    assert labels[0] == ["spikes in: additions", "sums of spikes in: MACs", "real in: MACs"]
    assert labels[1] == ["spikes in: additions", "real in: MACs"]


def test_tables_remark_them_and_add_no_published_additions() -> None:
    table = load_table("sg_resnet_table5")
    trainings = {
        connection: Training(
            load_config("digits", {}),
            {},
            {},
            1.0,
            "digits",
            "d" * 64,
            "abc",
            connection,
            card=energy_card(*in_batches(settled(connection))),
        )
        for connection in ("add", "iand")
    }
    assert list(energy_remark(table, [trainings["iand"]])) == []
    assert list(energy_remark(table, list(trainings.values()))) == ["4 layers fed by sums of spikes, counted as MACs"]
    assert list(energy_remark(load_table("sg_resnet_table8"), [trainings["add"]])) == []  # it shows no energy
    entry = next(entry for entry in table.entries() if entry.row.name == "SG ResNet18")
    assert {"macs", "energy_uj"} <= network_metrics(table, entry).keys()
    row = entry.row.model_copy(update={"overrides": {"model.connection": "add", "model.decoder": "rate"}})
    counted = network_metrics(table, dataclasses.replace(entry, row=row))
    assert counted["macs"] > 600e6
    assert "energy_uj" not in counted


def test_the_command_says_how_many_of_the_multiplications_are_theirs() -> None:
    def said(connection: str, *more: str) -> str:
        words = ["energy", "sg_resnet_tiny", f"model.connection={connection}", "model.stages=[2,1]"]
        words += ["model.decoder=rate", "--rate", "0.1", "--size", "8", *more]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        return " ".join(done.stdout.split())

    rows = json.loads(said("add", "--json"))["rows"]
    assert [row["input"] for row in rows].count("integers") == 3
    assert "3 layers fed by integers (sums of spikes), which binary spikes cannot carry: " in said("add")
    assert "integers" not in said("iand")
