"""The binary form of a network as a program: a list of steps for one image, on T x D time slots.

A chip's toolchain reads no Python. The program names what it needs: layers with weights, strides and D; neurons with
their equations' parameters; gates by their truth tables; and what is between them (additions, max-pools, upsampling,
concatenation), with the shape of every result. Batch norms are folded and chains merged. What runs before the first
neuron and behind the last one is real-valued; all between are spikes 0 and 1, as `slots.py` writes them.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from spikefleet_models.gates import Gate, LearnedGate, gate_forward
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import ILIF, PLIF, SpikingNode, build_neuron
from spikefleet_models.program_ops import TracedGate, TracedLayer, TracedNeuron
from spikefleet_models.slots import Layer, NotSpikeDrivenError, SlotLayer, ThermometerNode
from spikefleet_models.spike_edges import SpikeFed, layer_inputs

OPERATIONS = frozenset(
    {
        *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "div.Scalar", "mul.Scalar"),
        *("flatten.using_ints", "unflatten.int", "reshape.default", "view.default", "permute.default", "t.default"),
        *("transpose.int", "unsqueeze.default", "squeeze.dim", "expand.default", "select.int", "slice.Tensor"),
        *("cat.default", "stack.default", "max_pool2d.default", "upsample_nearest2d.vec"),
        *("mean.dim", "sum.dim_IntList", "amax.default", "sigmoid.default", "relu.default", "softmax.int"),
        *("einsum.default", "matmul.default", "group_norm.default"),
    }
)
"""What a program may name beside layers, neurons and gates: operations of PyTorch, none with side effects."""

_SAME = frozenset({"to.dtype", "detach.default", "clone.default", "contiguous.default", "dropout.default"})
"""Operations that change no value."""

_FORMAT = 1


@dataclass(frozen=True)
class BinaryProgram:
    """A program, and the tensors that it names."""

    description: Mapping[str, Any]
    """Plain data: `layers`, `neurons`, `gates`, `steps`, `outputs`, `input_shape`."""
    tensors: Mapping[str, Tensor]
    """Weights and biases, NAME.weight and NAME.bias, and further tensors."""


@torch.no_grad()
def trace(deployed: nn.Module, image: Tensor) -> BinaryProgram:
    """Write down what the binary form of a network does with one image.

    Args:
        deployed: a network after `reparam.deploy`, in fp32; not changed.
        image: [1, C, H, W].

    Raises:
        NotSpikeDrivenError: the network has no spike-driven form.
        ValueError: it uses an operation that programs do not have.
    """
    inputs = layer_inputs(deployed, image)
    network = copy.deepcopy(deployed).eval()
    slots = {name: source.bound for name, source in inputs.items() if isinstance(source, SpikeFed)}
    tables: dict[str, dict[str, Any]] = {"layers": {}, "neurons": {}, "gates": {}}
    tensors: dict[str, Tensor] = {}
    _replace(network, "", slots, tables, tensors)
    exported = torch.export.export(network, (image,), strict=False)
    signature = exported.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**dict(exported.state_dict), **exported.constants}
    named |= signature.inputs_to_lifted_tensor_constants
    steps: list[dict[str, Any]] = []
    same: dict[str, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in named and node.users:
                key = f"constants.{named[node.name]}"
                tensors[key] = constants[named[node.name]].detach().clone()
                same[node.name] = {"tensor": key}
            elif node.name not in named:
                same[node.name] = {"value": "image"}
        elif node.op == "call_function" and node.users:
            _write_step(node, steps, same)
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    description = {
        "format": _FORMAT,
        "input_shape": list(image.shape),
        **tables,
        "steps": steps,
        "outputs": [_plain(value, same) for value in output.args[0]],
    }
    return BinaryProgram(description, tensors)


def _replace(
    module: nn.Module,
    prefix: str,
    slots: Mapping[str, int],
    tables: dict[str, dict[str, Any]],
    tensors: dict[str, Tensor],
) -> None:
    """Put single operations in the place of neurons, gates and layers, and write down what they are."""
    for short, child in list(module._modules.items()):
        name = f"{prefix}{short}"
        if isinstance(child, SpikingNode):
            tables["neurons"][name] = _neuron(child)
            setattr(module, short, TracedNeuron(name, child))
        elif isinstance(child, Gate | LearnedGate):
            if not (isinstance(child, Gate) and child.name == "add"):
                tables["gates"][name] = _gate(child)
            setattr(module, short, TracedGate(name, child))
        elif isinstance(child, Layer):
            tables["layers"][name] = _layer(child, slots.get(name))
            tensors[f"{name}.weight"] = child.weight.detach().clone()
            if child.bias is not None:
                tensors[f"{name}.bias"] = child.bias.detach().clone()
            setattr(module, short, TracedLayer(name, child, slots.get(name, 1)))
        elif child is not None:
            _replace(child, f"{name}.", slots, tables, tensors)


def _neuron(node: SpikingNode) -> dict[str, Any]:
    if isinstance(node, ILIF):
        return {"kind": "ilif", "slots": node.bound, "leak": node.leak, "input_scale": node.input_scale}
    dynamics = node.dynamics()
    plain = {"kind": type(node).__name__.lower(), "slots": 1, "v_threshold": node.v_threshold, "v_reset": node.v_reset}
    if isinstance(node, PLIF):
        return {**plain, "decay_input": dynamics.decay_input, "w": node.w.item(), "tau": 1 / node.w.sigmoid().item()}
    return plain if dynamics.tau is None else {**plain, "decay_input": dynamics.decay_input, "tau": dynamics.tau}


def _gate(gate: Gate | LearnedGate) -> dict[str, Any]:
    if isinstance(gate, Gate):
        return {"kind": gate.name}
    at_silence, at_spike = gate.currents(gate.weight, gate.bias)
    return {
        "kind": "bsg_star",
        "opens_at_silence": [int(u >= 0) for u in at_silence.tolist()],
        "opens_at_spike": [int(u >= 0) for u in at_spike.tolist()],
    }


def _layer(layer: Layer, slots: int | None) -> dict[str, Any]:
    fed = {"fed_with": "real values" if slots is None else "spikes", "slots": slots or 1}
    if isinstance(layer, nn.Linear):
        return {"kind": "linear", **fed}
    if layer.padding_mode != "zeros":
        raise NotSpikeDrivenError(f"padding_mode={layer.padding_mode!r} has no place in a program; use 'zeros'")
    plain = {name: list(getattr(layer, name)) for name in ("stride", "padding", "dilation")}
    return {"kind": "conv2d", **fed, **plain, "groups": layer.groups}


def _write_step(node: Node, steps: list[dict[str, Any]], same: dict[str, Any]) -> None:
    namespace, _, operation = str(node.target).partition(".")
    if operation in _SAME:
        same[node.name] = _plain(node.args[0], same)
        return
    # In place on a value that nothing else reads, as ReLUs are.
    operation = operation.replace("_.", ".")
    arguments = [_plain(value, same) for value in node.args]
    if namespace == "spikefleet":
        kind = operation.removesuffix(".default")
        count = {"fire": 1, "layer": 1, "gate": 2}[kind]
        step = {"op": kind, "of": arguments[count], "args": arguments[:count]}
    elif operation in OPERATIONS:
        step = {"op": operation, "args": arguments}
        if named := {key: _plain(value, same) for key, value in node.kwargs.items()}:
            step["named"] = named
    else:
        raise ValueError(
            f"the network uses the operation {operation}, which a binary program does not have; export it as ONNX"
        )
    steps.append({"name": node.name, **step, "shape": list(node.meta["val"].shape)})


def _plain(value: Any, same: Mapping[str, Any]) -> Any:
    if isinstance(value, Node):
        return same.get(value.name, {"value": value.name})
    if isinstance(value, list | tuple):
        return [_plain(one, same) for one in value]
    return value


class ProgramRunner:
    """Runs a program, read from a file.

    Args:
        program: to run.
        dtype: fp32 as stored, or fp64.

    Raises:
        ValueError: the program names an operation, a layer or a tensor that there is not.
    """

    def __init__(self, program: BinaryProgram, dtype: torch.dtype = torch.float32) -> None:
        self._description = program.description
        self._tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in program.tensors.items()
        }
        self._dtype = dtype
        self._neurons = {name: _built_neuron(plain) for name, plain in program.description["neurons"].items()}
        self._layers = {
            name: _built_layer(plain, self._tensors, name) for name, plain in program.description["layers"].items()
        }

    @torch.no_grad()
    def run(self, image: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Run one image [1, C, H, W].

        Returns:
            The outputs, and the spikes [T * D, ...] of every neuron by its name.
        """
        values: dict[str, Tensor] = {"image": image.to(self._dtype)}
        spikes: dict[str, Tensor] = {}
        for step in self._description["steps"]:
            arguments = [self._value(one, values) for one in step["args"]]
            if step["op"] == "fire":
                result = spikes[step["of"]] = self._neurons[step["of"]](*arguments)
            elif step["op"] == "layer":
                result = self._layers[step["of"]](*arguments)
            elif step["op"] == "gate":
                result = _joined(self._description["gates"][step["of"]], *arguments)
            elif step["op"] in OPERATIONS:
                name, overload = step["op"].split(".")
                named = {key: self._value(one, values) for key, one in step.get("named", {}).items()}
                result = getattr(getattr(torch.ops.aten, name), overload)(*arguments, **named)
            else:
                raise ValueError(f"the program names the operation {step['op']!r}, which programs do not have")
            values[step["name"]] = result
        return [self._value(one, values) for one in self._description["outputs"]], spikes

    def _value(self, plain: Any, values: Mapping[str, Tensor]) -> Any:
        if isinstance(plain, Mapping):
            return self._tensors[plain["tensor"]] if "tensor" in plain else values[plain["value"]]
        return [self._value(one, values) for one in plain] if isinstance(plain, list) else plain


def _built_neuron(plain: Mapping[str, Any]) -> nn.Module:
    fields = {key: value for key, value in plain.items() if key not in ("slots", "w")}
    if plain["kind"] == "ilif":
        fields["bound"] = plain["slots"]
    node = build_neuron(NeuronConfig(**fields))
    if isinstance(node, PLIF):
        nn.init.constant_(node.w, plain["w"])
    return ThermometerNode(node) if node.bound > 1 else node


def _built_layer(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> nn.Module:
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    layer: Layer
    if plain["kind"] == "linear":
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        stride, padding, dilation = (tuple(plain[key]) for key in ("stride", "padding", "dilation"))
        channels = weight.shape[1] * plain["groups"]
        window = (weight.shape[2], weight.shape[3])
        layer = nn.Conv2d(
            channels,
            weight.shape[0],
            window,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=plain["groups"],
            bias=bias is not None,
            device="meta",
        )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer if plain["slots"] == 1 else _SlotLayerOfAnyT(layer, plain["slots"])


class _SlotLayerOfAnyT(nn.Module):
    """A `SlotLayer` for one image, where T is the leading axis over D."""

    def __init__(self, layer: Layer, slots: int) -> None:
        super().__init__()
        self.layer = layer
        self.slots = slots

    def forward(self, spikes: Tensor) -> Tensor:
        T = spikes.shape[0] // self.slots
        summed: Tensor = SlotLayer(self.layer, T, self.slots)(spikes)
        return summed


def _joined(plain: Mapping[str, Any], h: Tensor, x: Tensor) -> Tensor:
    if plain["kind"] != "bsg_star":
        return gate_forward(plain["kind"], h, x, torch.empty_like(h))
    at_silence, at_spike = (
        torch.tensor(plain[key], dtype=h.dtype)[:, None, None] for key in ("opens_at_silence", "opens_at_spike")
    )
    return torch.lerp(x, h, torch.where(h > 0, at_spike, at_silence))
