"""Programs of the binary form: read by their description alone, they fire as the binary form in memory, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefleet.errors import RunError
from spikefleet.export.comparison import compare_spikes
from spikefleet.export.pixels import Scaling
from spikefleet.export.spikes_file import KEY, SpikesFile, binary_network, write_spikes
from spikefleet_models.binary_program import BinaryProgram, ProgramRunner, trace
from spikefleet_models.families import build_model, model_config
from spikefleet_models.reparam import deploy
from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_pipelines.transforms.normalise_config import Normalisation
from support.exported import Pixels, lively

SCALING = Scaling(Normalisation(mean=(0.4,), std=(0.3,)))
YOLO: dict[str, Any] = {"depth": 0.1, "width": 0.0625, "num_classes": 2}


def network_of(name: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return lively(build_model(model_config(name, **fields)))


class ByDescription:
    """Neurons, gates and layers by what `SEMANTICS` says of them; the rest is PyTorch's, as the program names it."""

    def __init__(self, description: Any, tensors: dict[str, Tensor]) -> None:
        self.program, self.tensors = description, {name: one.double() for name, one in tensors.items()}
        self.spikes: dict[str, Tensor] = {}

    def run(self, image: Tensor) -> list[Tensor]:
        values = {"image": image}

        def read(plain: Any) -> Any:
            if isinstance(plain, dict):
                return self.tensors[plain["tensor"]] if "tensor" in plain else values[plain["value"]]
            return [read(one) for one in plain] if isinstance(plain, list) else plain

        for step in self.program["steps"]:
            arguments = read(step["args"])
            if step["op"] == "fire":
                result = self.spikes[step["of"]] = self.fire(self.program["neurons"][step["of"]], *arguments)
            elif step["op"] == "layer":
                result = self.layer(step["of"], *arguments)
            elif step["op"] == "gate":
                result = self.gate(self.program["gates"][step["of"]], *arguments)
            else:
                name, overload = step["op"].split(".")
                result = getattr(getattr(torch.ops.aten, name), overload)(*arguments, **step.get("named", {}))
            assert list(result.shape) == step["shape"]
            values[step["name"]] = result
        return list(read(self.program["outputs"]))

    def fire(self, neuron: Any, currents: Tensor) -> Tensor:
        state, slots = torch.full_like(currents[0], neuron.get("v_reset") or 0.0), []
        for x in currents:
            if neuron["kind"] == "ilif":
                state = neuron["leak"] * state + neuron["input_scale"] * x
                n = state.clip(0, neuron["slots"]).round()
                slots += [(n > d).double() for d in range(neuron["slots"])]
                state = state - n
                continue
            rest = neuron["v_reset"] or 0.0
            if neuron["kind"] != "if":
                leaving = (state - rest) / neuron["tau"]
                x = (x - (state - rest)) / neuron["tau"] if neuron["decay_input"] else x - leaving
            h = state + x
            slots.append((h >= neuron["v_threshold"]).double())
            after = h - neuron["v_threshold"] if neuron["v_reset"] is None else torch.full_like(h, rest)
            state = torch.where(slots[-1] > 0, after, h)
        return torch.stack(slots)

    def layer(self, name: str, x: Tensor) -> Tensor:
        layer, weight, bias = (
            self.program["layers"][name],
            self.tensors[f"{name}.weight"],
            self.tensors.get(f"{name}.bias"),
        )
        slots = layer["slots"]
        if layer["fed_with"] == "spikes":
            assert set(x.unique().tolist()) <= {0.0, 1.0}
        steps = x.unflatten(0, (-1, slots)).sum(1)  # of binary spikes: a layer is linear
        if layer["kind"] == "linear":
            return F.linear(steps, weight, bias)
        return F.conv2d(steps, weight, bias, layer["stride"], layer["padding"], layer["dilation"], layer["groups"])

    def gate(self, gate: Any, h: Tensor, x: Tensor) -> Tensor:
        if gate["kind"] == "bsg_star":
            opens = {
                key: torch.tensor(gate[key]).bool()[:, None, None] for key in ("opens_at_silence", "opens_at_spike")
            }
            return torch.where(torch.where(h > 0, opens["opens_at_spike"], opens["opens_at_silence"]), h, x)
        return {"bsg": torch.maximum(h, x), "and": h * x, "iand": (1 - h) * x}[gate["kind"]]


NETWORKS = [
    ("sg_resnet_tiny", {"stages": (1, 1), "width": 0.25, "timesteps": 3, "stem": "imagenet"}, 16),
    (
        "sg_resnet_tiny",
        {"stages": (2,), "width": 0.25, "connection": "bsg_star", "decoder": "rate", "neuron": {"kind": "plif"}},
        8,
    ),
    ("sg_resnet_tiny", {"stages": (1, 1), "width": 0.25, "connection": "iand", "neuron": {"v_reset": None}}, 8),
    ("sg_resnet_tiny", {"stages": (1, 1), "width": 0.25, "connection": "post_add", "neuron": {"kind": "lif"}}, 8),
    ("spike_yolo_n", {**YOLO, "in_channels": 1, "timesteps": 2}, 32),
]


@pytest.mark.parametrize(("name", "fields", "side"), NETWORKS)
def test_a_program_read_by_its_description_is_the_binary_form(
    name: str, fields: dict[str, Any], side: int, tmp_path: Path
) -> None:
    network, pixels = network_of(name, **fields), Pixels(2, (1, side, side))
    write_spikes(network, SCALING, pixels.all()[:1], tmp_path / "a.spikes", {"classes": ["a"]})
    file, binary = SpikesFile(tmp_path / "a.spikes", SCALING), binary_network(network, SCALING)
    file.check_test_vector()
    assert file.description["network"] == {"classes": ["a"]}

    def trained(given: Any) -> list[Tensor]:
        outputs = network(SCALING(torch.from_numpy(given)))
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    found = compare_spikes(file.run, binary.run, trained, pixels)
    assert found.images == 2
    assert found.spikes is not None
    assert found.max_difference < 1e-9
    reader = ByDescription(file.description["program"], dict(file.program.tensors))
    outputs = reader.run(SCALING(torch.from_numpy(pixels.all()[:1])).double())
    expected, spikes = binary.run(pixels.all()[:1])
    assert reader.spikes.keys() == spikes.keys()
    for neuron, fired in spikes.items():
        assert torch.equal(reader.spikes[neuron], fired), neuron
        assert torch.equal(file.test_spikes(neuron), fired.bool())
    for one, other in zip(outputs, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    rates = torch.stack([fired.mean() for fired in spikes.values()])
    assert (rates > 0).double().mean() > 0.7  # silence would show nothing


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    network = network_of("sg_resnet_tiny", stages=(1,), width=0.125, decoder="rate")
    path = tmp_path_factory.mktemp("program") / "a.spikes"
    write_spikes(network, SCALING, Pixels(1).all(), path, {})
    return network, path


def test_a_changed_weight_or_spike_is_refused(written: tuple[nn.Module, Path], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    network, path = written
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    changed = {**tensors, "stages.0.0.convs.1.weight": tensors["stages.0.0.convs.1.weight"] * 1.5}
    save_file(changed, tmp_path / "weight", metadata)
    wrong = SpikesFile(tmp_path / "weight", SCALING)
    with pytest.raises(RunError, match="test vector"):
        wrong.check_test_vector()
    with pytest.raises(RunError, match=r"stages\.0\.0\.units\.1\.neuron fires otherwise than the network"):
        compare_spikes(wrong.run, binary_network(network, SCALING).run, lambda given: [], Pixels(4))
    name = "test/spikes/stem.unit.neuron"
    save_file({**tensors, name: tensors[name] ^ 1}, tmp_path / "spike", metadata)
    with pytest.raises(RunError, match=r"does not fire neuron stem\.unit\.neuron"):
        SpikesFile(tmp_path / "spike", SCALING).check_test_vector()


def test_a_program_cannot_name_any_other_operation(written: tuple[nn.Module, Path]) -> None:
    program = SpikesFile(written[1], SCALING).program
    plain = json.loads(json.dumps(dict(program.description)))
    plain["steps"][-1]["op"] = "from_file.default"
    with pytest.raises(ValueError, match=r"'from_file\.default', which programs do not have"):
        ProgramRunner(BinaryProgram(plain, program.tensors)).run(torch.zeros(1, 1, 8, 8))


def test_what_has_no_binary_form_has_no_program() -> None:
    added = deploy(network_of("sg_resnet_tiny", stages=(2,), width=0.125, decoder="rate", connection="add"))
    with pytest.raises(NotSpikeDrivenError, match="integers computed from the spikes"):
        trace(added, torch.rand(1, 1, 8, 8))

    class Cumulative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = deploy(network_of("sg_resnet_tiny", stages=(1,), width=0.125, decoder="rate"))

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(images)
            return logits.cumsum(1)

    with pytest.raises(ValueError, match=r"cumsum\.default, which a binary program does not have"):
        trace(Cumulative(), torch.rand(1, 1, 8, 8))


def test_the_file_is_one_that_safetensors_reads(written: tuple[nn.Module, Path]) -> None:
    from safetensors import safe_open

    with safe_open(written[1], framework="np") as file:
        described = json.loads(file.metadata()[KEY])
        assert set(described) == {"network", "semantics", "program", "test_spikes"}
        assert np.array_equal(file.get_tensor("test/pixels"), Pixels(1).all())
    kinds = {layer["fed_with"] for layer in described["program"]["layers"].values()}
    assert kinds == {"real values", "spikes"}
    assert described["program"]["layers"]["stem.conv"]["fed_with"] == "real values"
