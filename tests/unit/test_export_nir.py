"""NIR files: run by NIR's definitions, every node fires as the network does; what NIR lacks is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

nir = pytest.importorskip("nir", reason="spikefleet[export] is not installed")

from spikefleet.errors import RunError, UserError  # noqa: E402
from spikefleet.export.comparison import compare_spikes  # noqa: E402
from spikefleet.export.nir_file import NirFile, folded_network, write_nir, write_test_vector  # noqa: E402
from spikefleet.export.nir_graph import nir_graph  # noqa: E402
from spikefleet.export.pixels import Scaling  # noqa: E402
from spikefleet.export.recorded import RecordedNetwork  # noqa: E402
from spikefleet_models.families import build_model, model_config  # noqa: E402
from spikefleet_models.gates import Gate  # noqa: E402
from spikefleet_models.reparam import deploy  # noqa: E402
from spikefleet_pipelines.transforms.normalise_config import NORMALISATIONS  # noqa: E402
from support.exported import Pixels, lively  # noqa: E402
from support.nir_numpy import run_file  # noqa: E402

SCALING = Scaling(NORMALISATIONS["digits"])
STEPS = 3
SHAPE = (1, 16, 16)


def network_of(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"stages": (2, 1), "width": 0.125, "timesteps": STEPS, "decoder": "rate", "stem": "imagenet", **fields}
    return lively(build_model(model_config("sg_resnet_tiny", **settings)))


def written(network: nn.Module, path: Path) -> Path:
    write_nir(nir_graph(network, SHAPE), path)
    return path


def compared(network: nn.Module, path: Path) -> Any:
    def trained(pixels: Any) -> list[torch.Tensor]:
        return [network(SCALING(torch.from_numpy(pixels)))]

    file = NirFile(path, SCALING, STEPS)
    return compare_spikes(file.run, folded_network(network, SCALING).run, trained, Pixels(8, SHAPE))


@pytest.mark.parametrize(
    ("connection", "neuron"),
    [
        ("bsg", {"kind": "if"}),
        ("bsg_star", {"kind": "lif", "tau": 1.5}),
        ("add", {"kind": "lif", "decay_input": False, "v_reset": 0.1, "tau": 3.0}),
        ("and", {"kind": "if"}),
        ("iand", {"kind": "plif", "v_threshold": 0.7}),
        ("post_add", {"kind": "if", "v_reset": -0.2}),
    ],
)
def test_every_node_fires_as_the_network_does(connection: str, neuron: dict[str, Any], tmp_path: Path) -> None:
    network = network_of(connection=connection, neuron=neuron)
    graph = nir.read(written(network, tmp_path / "a.nir"))
    pixels = Pixels(2, SHAPE).all()
    # The folded network itself, whose neurons fire at >= V_th, not at the file's threshold below it.
    deployed = deploy(network)
    firing = ("neuron", "gate", "pool")
    names = [
        name
        for name in dict(deployed.named_modules())
        if name.endswith(firing) and not (connection == "add" and name.endswith("gate"))
    ]
    (logits,), spikes = RecordedNetwork(deployed, SCALING, names, torch.float64).run(pixels)
    rates = []
    for row, image in enumerate(SCALING(torch.from_numpy(pixels)).double().numpy()):
        values = run_file(graph, image, STEPS)
        for name in names:
            assert np.array_equal(values[name], spikes[name][:, row].numpy()), name
            rates.append(values[name].mean())
        assert np.allclose(values["output"].mean(0), logits[row].numpy(), atol=1e-12)
    assert sum(rate > 0 for rate in rates) > len(rates) / 2  # silence would show nothing
    found = compared(network, tmp_path / "a.nir")
    assert found.images == 8
    assert found.max_difference < 1e-9
    assert found.same_class == 8


def test_the_gates_of_bsg_star_are_of_all_four_kinds() -> None:
    graph = nir_graph(network_of(connection="bsg_star"), SHAPE)
    kinds = {
        (float(h), float(x), float(t))
        for name, node in graph.nodes.items()
        if name.endswith(".gate")
        for h, x, t in zip(
            graph.nodes[f"{name}.residual"].scale[:, 0, 0],
            graph.nodes[f"{name}.shortcut"].scale[:, 0, 0],
            node.threshold[:, 0, 0],
            strict=True,
        )
    }
    assert kinds == {(1, 1, 0.5), (1, 1, 1.5), (1, 0, 0.5), (0, 1, 0.5)}  # or, and, H, X


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    network = network_of(connection="bsg")
    path = written(network, tmp_path / "a.nir")
    for change in ("weight", "threshold", "edge"):
        graph = nir.read(path)
        if change == "weight":
            graph.nodes["stages.0.0.convs.1"].weight[0, 0] += 0.5
        elif change == "threshold":
            graph.nodes["stem.unit.neuron"].v_threshold[...] *= 1.3
        else:
            graph.edges.remove(("stem.pool", "stages.0.0.units.1.gate"))
        write_nir(graph, tmp_path / "wrong.nir")
        with pytest.raises(RunError, match=r"fires otherwise than the network: .* nothing is written"):
            compared(network, tmp_path / "wrong.nir")


def test_a_changed_classifier_is_refused(tmp_path: Path) -> None:
    network = network_of(connection="bsg")
    graph = nir.read(written(network, tmp_path / "a.nir"))
    graph.nodes["classifier"].bias[0] += 0.01
    write_nir(graph, tmp_path / "wrong.nir")
    with pytest.raises(RunError, match=r"outputs differ from the network's by 0\.01"):
        compared(network, tmp_path / "wrong.nir")


def grouped() -> nn.Module:
    network = network_of()
    conv = network.get_submodule("stages.0.0.convs.0")
    network.get_submodule("stages.0.0.convs")[0] = nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, padding=1, groups=2
    )
    return network


def gate_behind_add() -> nn.Module:
    network = network_of(connection="add")
    network.get_submodule("stages.0.1.units.1").gate = Gate("bsg")
    return network


REFUSED = [
    (lambda: network_of(decoder="asd", asd_channel_reduction=4), r"decoder: attention multiplies spikes"),
    (lambda: network_of(neuron={"kind": "ilif", "bound": 1}), r"stem\.unit\.neuron: I-LIF emits integers up to D=1"),
    (lambda: network_of(neuron={"v_reset": None}), r"stem\.unit\.neuron: soft reset"),
    (grouped, r"stages\.0\.0\.convs\.0: grouped convolutions"),
    (gate_behind_add, r"stages\.0\.1\.units\.1\.gate: it reads the sum of .* integers"),
    (lambda: network_of(connection="ann"), r"ReLU is no spiking neuron.* the network: it has no spiking neuron"),
    (
        lambda: build_model(model_config("spike_yolo_n", depth=0.1, width=0.0625)),
        r"I-LIF emits integers up to D=4.*grouped convolutions.*upsample: NIR has neither upsampling nor concatenation",
    ),
    (
        lambda: build_model(model_config("retinanet_tiny")),
        r"decoders\.0: attention .*pyramid: a feature pyramid upsamples",
    ),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_what_nir_has_no_node_for_is_refused_by_layer(make: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        nir_graph(make().eval(), SHAPE)


def test_the_test_vector_is_what_a_deployer_must_get(tmp_path: Path) -> None:
    network = network_of(connection="iand")
    graph = nir.read(written(network, tmp_path / "a.nir"))
    path = tmp_path / "a.nir.test.npz"
    write_test_vector(folded_network(network, SCALING), Pixels(1, SHAPE).all(), SCALING, path)
    with np.load(path) as vector:
        values = run_file(graph, vector["input"][0].astype(float), STEPS)
        scaled = (vector["pixels"] / 255 - np.float32(0.3053)) / np.float32(0.376)
        assert np.allclose(scaled, vector["input"], atol=1e-6)
        names = [name for name in vector.files if name.startswith("spikes/")]
        assert len(names) == 12
        for name in names:
            assert np.array_equal(values[name.removeprefix("spikes/")], vector[name][:, 0])
        assert np.allclose(values["output"].mean(0), vector["logits"][0])


def test_metadata_survive_the_file(tmp_path: Path) -> None:
    graph = nir_graph(network_of(), SHAPE)
    graph.metadata = {"spikefleet": json.dumps({"classes": ["ä", "b"]})}
    write_nir(graph, tmp_path / "a.nir")
    assert json.loads(nir.read(tmp_path / "a.nir").metadata["spikefleet"]) == {"classes": ["ä", "b"]}
