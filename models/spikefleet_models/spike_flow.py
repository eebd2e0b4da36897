"""Who is fed by spikes: tensors followed through one forward pass, from the image to the outputs.

Operations are seen where torch dispatches them, whichever module or function called them. A tensor is known by its
storage, so every reshape keeps its origin. Neurons, gates and layers are one operation each, whatever they do inside.

    kind      values                                                            made by
    image     real, dependent on the image alone                                anything
    spikes    0 and 1, or integers up to D that D binary slots can carry        a neuron; a selection of such; a gate
    sum       integers: spikes added up                                         ADD, as a gate or by hand
    current   what a membrane adds up: outputs of layers that spikes feed,      a layer on spikes; selections and sums
              spikes themselves (synapses of weight 1), branches of the image   of these
    real      all others that depend on spikes                                  any other operation

A selection is an operation each of whose outputs is one of its inputs (max-pool, nearest upsampling, concatenation,
zero padding, copies): it acts on each binary slot alone. Tensors that do not depend on the image have no origin.

`operation_counts.py` counts and `spike_edges.py` judges what is found here, so energy cards and proofs agree.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spikefleet_models.gates import Gate, LearnedGate
from spikefleet_models.neurons import IF, ILIF, LIF, PLIF
from spikefleet_models.slots import ThermometerNode

Kind = Literal["image", "spikes", "sum", "current", "real"]
Rule = Literal["view", "selection", "addition", "other"]

NEURONS = frozenset({IF, LIF, PLIF, ILIF, ThermometerNode})
GATES = frozenset({Gate, LearnedGate})
LAYERS = frozenset({nn.Conv2d, nn.Linear})

_VIEWS = frozenset(
    {"view", "_unsafe_view", "_reshape_alias", "alias", "detach", "lift_fresh", "expand", "permute", "transpose", "t"}
    | {"slice", "select", "unsqueeze", "squeeze", "unbind", "split", "split_with_sizes", "diagonal", "unfold"}
    | {"as_strided"}
)
_SELECTIONS = frozenset(
    {"clone", "_to_copy", "copy_", "cat", "stack", "repeat", "index_select", "constant_pad_nd"}
    | {"max_pool2d_with_indices", "upsample_nearest2d", "upsample_nearest3d"}
)
_ADDITIONS = frozenset({"add", "add_"})
_READS_SHAPE = frozenset(
    {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
    | {"new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"}
)
# A conversion to another type rounds real values.
_REAL_TYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class Origin(NamedTuple):
    """Where the values of a tensor come from."""

    kind: Kind
    nodes: tuple[str, ...] = ()
    """Names of the neurons whose spikes they are made of."""
    timesteps: int = 0
    """T of these neurons."""
    bound: int = 0
    """The most that a value of spikes or sums can be; 0 where that is not known, and for other kinds."""
    layer: str = ""
    """The layer whose output they are made of; empty for what is made of the image or of spikes themselves."""
    operations: tuple[str, ...] = ()
    """What was done to spikes to get them, where there is no layer."""
    culprit: str = ""
    """The operation or layer that made them real, and its module."""


class Operation(NamedTuple):
    """An operation on tensors of which at least one depends on the image."""

    name: str
    args: tuple[Any, ...]
    result: Any
    inputs: tuple[Origin, ...]
    output: Origin
    in_layer: bool
    """Whether it is a part of a layer: then `output` is what feeds the layer."""


@dataclass
class _Call:
    """The neuron, gate or layer that runs; modules inside it are part of it."""

    is_layer: bool
    inputs: tuple[Origin | None, ...]
    storages: frozenset[StorageWeakRef | int]
    """Those of the inputs."""
    depth: int = 0
    reads: list[Origin] = field(default_factory=list)
    """What a neuron or gate reads beside its inputs."""


class SpikeFlow(TorchDispatchMode):
    """Follows tensors through a network, in eval mode and not changed; subclasses override the `after_` methods."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network
        # A weak reference keeps the storage's identity from being given to another tensor, but not its memory.
        self._origins: dict[StorageWeakRef | int, Origin] = {}
        self._without_storage: list[Tensor] = []
        self._running: list[str] = []
        self._call: _Call | None = None

    def after_operation(self, operation: Operation) -> None:
        """Called after each operation outside neurons and gates, before its results have an origin."""

    def after_neuron(self, name: str, fed_by: Origin | None) -> None:
        """Called after each call of a neuron; `fed_by` is None where its input does not depend on the image."""

    def after_layer(self, name: str, fed_by: Origin | None) -> None:
        """Called after each call of a convolution or linear layer."""

    @torch.no_grad()
    def follow(self, images: Tensor) -> Any:
        """Run the network once and return its outputs. Spiking units call their parts one by one meanwhile."""
        # What a network keeps from one call to the next keeps its origin.
        alive = [key for key in self._origins if isinstance(key, StorageWeakRef) and not key.expired()]
        self._origins = {key: self._origins[key] for key in alive}
        self._without_storage = []
        self._set(images, Origin("image"))
        with self._watching(), self:
            return self._network(images)

    def origin(self, tensor: Tensor) -> Origin | None:
        """Where a tensor comes from; None if it does not depend on the image."""
        return self._origins.get(self._key(tensor))

    @property
    def module(self) -> str:
        """Name of the innermost module that runs."""
        return self._running[-1] if self._running else ""

    def _key(self, tensor: Tensor) -> StorageWeakRef | int:
        if tensor.layout is torch.strided:
            return StorageWeakRef(tensor.untyped_storage())
        self._without_storage.append(tensor)  # keeps its id from being given to another one
        return id(tensor)

    def _set(self, tensor: Tensor, origin: Origin | None) -> None:
        if origin is None:
            self._origins.pop(self._key(tensor), None)
        else:
            self._origins[self._key(tensor)] = origin

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with ExitStack() as stack:

            def hook(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
                # What hooks of others do is an operation before or after the module.
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after, prepend=True).remove)

            for name, module in self._network.named_modules():
                hook(module, self._push(name), self._pop)
                # A subclass, or a forward of its own, could compute anything: it is the operations that it runs.
                kind = None if "forward" in vars(module) else type(module)
                if kind in NEURONS or kind in GATES:
                    hook(module, self._enter(is_layer=False), self._leave(name))
                elif kind in LAYERS:
                    hook(module, self._enter(is_layer=True), self._leave(name))
            yield

    def _push(self, name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: self._running.append(name)

    def _pop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()

    def _enter(self, is_layer: bool) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._call is None:
                given = _tensors((args, kwargs))
                self._call = _Call(is_layer, tuple(map(self.origin, given)), frozenset(map(self._key, given)))
            self._call.depth += 1

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, output: Tensor) -> None:
            call = self._call
            assert call is not None
            call.depth -= 1
            if call.depth:
                return
            self._call = None
            if isinstance(module, nn.Conv2d | nn.Linear):
                self.after_layer(name, call.inputs[0])
                self._set(output, self._weighted(name, module, call.inputs[0]))
            elif isinstance(module, Gate | LearnedGate):
                self._after_gate(module, call, output)
            else:
                known = _known([*call.inputs, *call.reads])
                self.after_neuron(name, self._addition("neuron", known) if len(known) > 1 else next(iter(known), None))
                bound = 1 if isinstance(module, ThermometerNode) else int(module.bound)  # type: ignore[arg-type]
                self._set(output, Origin("spikes", (name,), output.shape[0], bound))

        return leave

    def _after_gate(self, gate: Gate | LearnedGate, call: _Call, joined: Tensor) -> None:
        name, inputs = f"gate {gate.name}" if isinstance(gate, Gate) else "gate bsg_star", (*call.inputs, *call.reads)
        if not any(inputs):
            return
        if call.reads:
            output = self._real(name, inputs)
        elif name == "gate add":
            output = self._addition(name, inputs)
        else:
            output = self._selection(name, inputs)
            if output.kind not in ("spikes", "sum"):
                output = self._real(name, inputs)
            elif output.bound > 1:
                output = _merged("sum", name, inputs, output.bound)  # no slot of an integer is gated alone
        self.after_operation(Operation(name, (), joined, _known(inputs), output, in_layer=False))
        self._set(joined, output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._call is None or self._call.is_layer:
            self._follow_operation(func, args, kwargs or {}, result)
        else:
            others = [tensor for tensor in _tensors((args, kwargs)) if self._key(tensor) not in self._call.storages]
            self._call.reads += _known([self.origin(tensor) for tensor in others])
        return result

    def _follow_operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        overwritten = {argument.name for argument in func._schema.arguments if argument.is_out}
        given = _tensors((args, {key: value for key, value in kwargs.items() if key not in overwritten}))
        outputs = [*_tensors(result), *_written(func, args, kwargs)]
        if name == "copy_" and _is_whole(args[0]):
            given = given[1:]  # nothing is left of what was there
        inputs = [self.origin(tensor) for tensor in given]
        if not any(inputs) or name in _READS_SHAPE:
            for tensor in outputs:
                self._set(tensor, None)
            return
        in_layer = self._call is not None
        rule = self._rule(func, name, args, kwargs)
        if self._call is not None and (fed_by := self._call.inputs[0]) is not None:
            output = fed_by
        elif rule == "view":
            output = _known(inputs)[0]
        elif rule == "selection":
            output = self._selection(name, inputs[:1] if name == "index_select" else inputs)
        elif rule == "addition":
            plain = isinstance(args[1], Tensor) or args[1] == 0
            output = self._addition(name, inputs if plain else [*inputs, None])
        else:
            output = self._real(name, inputs)
        if outputs and not in_layer and _is_rounded(output, outputs[0].dtype):
            output = self._real(name, inputs)
        self.after_operation(Operation(name, args, result, _known(inputs), output, in_layer))
        if rule == "view" and not func._schema.is_mutable:
            return
        for position, tensor in enumerate(outputs):
            indices = name == "max_pool2d_with_indices" and position == 1
            self._set(tensor, self._real(name, inputs) if indices else output)

    def _rule(self, func: Any, name: str, args: Any, kwargs: Any) -> Rule:
        if name in _VIEWS and func._overloadname != "dtype":
            return "view"
        if name == "index_select" and self.origin(args[2]) is not None:
            return "other"  # which values are taken depends on spikes
        if name == "constant_pad_nd" and (args[2] if len(args) > 2 else kwargs.get("value", 0)) != 0:
            return "other"
        if name in _SELECTIONS:
            return "selection"
        alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
        return "addition" if name in _ADDITIONS and alpha == 1 else "other"

    def _selection(self, name: str, inputs: Sequence[Origin | None]) -> Origin:
        """What an operation makes each of whose outputs is one of its inputs; None is a constant."""
        known = _known(inputs)
        if any(origin.kind == "real" for origin in known):
            return self._real(name, inputs)
        if all(origin is not None and origin.kind in ("spikes", "sum") for origin in inputs):
            same = len({(origin.kind, origin.timesteps, origin.bound) for origin in known}) == 1
            kind: Kind = "spikes" if same and known[0].kind == "spikes" else "sum"
            return _merged(kind, name, inputs, max(origin.bound for origin in known))
        return _merged("current", name, inputs)

    def _addition(self, name: str, inputs: Sequence[Origin | None]) -> Origin:
        """What a sum is; None is a constant."""
        known = _known(inputs)
        if any(origin.kind == "real" for origin in known):
            return self._real(name, inputs)
        if all(origin.kind in ("spikes", "sum") for origin in known):
            bounded = len(known) == len(inputs) and all(origin.bound for origin in known)
            return _merged("sum", name, inputs, sum(origin.bound for origin in known) if bounded else 0)
        return _merged("current", name, inputs)

    def _real(self, name: str, inputs: Sequence[Origin | None]) -> Origin:
        """What any other operation makes."""
        earlier = next((origin.culprit for origin in _known(inputs) if origin.culprit), "")
        where = f" in {self.module}" if self.module else ""
        output = _merged("real", name, inputs)
        return output._replace(culprit=earlier or f"operation {name}{where}") if output.kind == "real" else output

    def _weighted(self, name: str, layer: nn.Conv2d | nn.Linear, fed_by: Origin | None) -> Origin | None:
        """The origin of the output of a layer."""
        weights = _known([self.origin(tensor) for tensor in (layer.weight, layer.bias) if tensor is not None])
        known = (*_known([fed_by]), *weights)
        if not known:
            return None
        if all(origin.kind == "image" for origin in known):
            return Origin("image", layer=name)
        current = not weights and fed_by is not None and fed_by.kind == "spikes"
        earlier = next((origin.culprit for origin in known if origin.culprit), "")
        return Origin(
            "current" if current else "real",
            tuple(dict.fromkeys(node for origin in known for node in origin.nodes)),
            max(origin.timesteps for origin in known),
            layer=name,
            culprit="" if current else earlier or f"layer {name}",
        )


def _merged(kind: Kind, name: str, inputs: Sequence[Origin | None], bound: int = 0) -> Origin:
    """The origin of what an operation makes of these inputs; of the image where no spikes are among them."""
    known = _known(inputs)
    of_spikes = [origin for origin in known if origin.kind != "image"]
    if not of_spikes:
        return next((origin for origin in known if origin.layer), known[0])
    nodes = tuple(dict.fromkeys(node for origin in of_spikes for node in origin.nodes))
    timesteps = max(origin.timesteps for origin in of_spikes)
    direct = [origin for origin in of_spikes if not origin.layer]
    if not direct:
        return Origin(kind, nodes, timesteps, bound, of_spikes[0].layer)
    done = () if kind == "spikes" else (*(one for origin in direct for one in origin.operations), name)
    return Origin(kind, nodes, timesteps, bound, "", tuple(dict.fromkeys(done)))


def _is_rounded(origin: Origin, dtype: torch.dtype) -> bool:
    if origin.kind in ("spikes", "sum"):
        return dtype == torch.bool and origin.bound != 1
    return origin.kind == "current" and dtype not in _REAL_TYPES


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all of its storage."""
    return tensor.layout is torch.strided and tensor.nbytes == tensor.untyped_storage().nbytes()


def _known(inputs: Sequence[Origin | None]) -> tuple[Origin, ...]:
    return tuple(origin for origin in inputs if origin is not None)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Arguments that an operation changes."""
    if not func._schema.is_mutable:
        return []
    changed = {argument.name for argument in func._schema.arguments if argument.is_write}
    named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
    return _tensors([value for name, value in (*named, *kwargs.items()) if name in changed])
