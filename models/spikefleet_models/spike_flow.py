"""Who is fed by spikes: tensors followed through one forward pass, from the image to the outputs.

Operations are seen where torch dispatches them, whichever module or function called them. A tensor is known by its
storage, so every reshape keeps its origin. Neurons, gates and layers are one operation each, whatever they do inside.
What an operation makes of its inputs is `spike_origins.py`'s rule.

Code that hides from torch what it computes is not followed: work in another thread, memory shared through NumPy or
dlpack, hooks that a forward adds to its own modules, numbers that Python makes of values without an operation, as
`len(repr(x))` does. New tensors from there are foreign and refused on the way to a neuron; constants that change with
the spikes are found by `hidden_values.py`. What changes a current itself unseen is not found.

`operation_counts.py` counts and `spike_edges.py` judges what is found here, so energy cards and proofs agree.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spikefleet_models.gates import Gate, LearnedGate
from spikefleet_models.neurons import IF, ILIF, LIF, PLIF
from spikefleet_models.slots import ThermometerNode
from spikefleet_models.spike_origins import (
    FOREIGN,
    READS_SHAPE,
    Origin,
    derive,
    gated,
    is_whole,
    origins,
    rounded,
    rule_of,
    weighted,
)

INPUT = "the input"
"""Stands for a neuron layer where the input of a network is spikes."""
NEURONS = frozenset({IF, LIF, PLIF, ILIF, ThermometerNode})
GATES = frozenset({Gate, LearnedGate})
LAYERS = frozenset({nn.Conv2d, nn.Linear})

_READS_VALUES = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
# Python reads these without an operation.
_READERS = frozenset({"numpy", "tolist", "__array__", "__dlpack__", "data_ptr"})

_Key = StorageWeakRef | int


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
    storages: frozenset[_Key]
    """Those of the inputs."""
    depth: int = 0
    reads: list[Origin] = field(default_factory=list)
    """What a neuron or gate reads beside its inputs."""


class _Dispatching:
    """Hands operations to `_dispatch`.

    torch wraps a mode's own `__torch_dispatch__` in a function that imports its compiler, which takes seconds; not an
    inherited one.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class SpikeFlow(_Dispatching, TorchDispatchMode):
    """Follows tensors through a network, in eval mode and not changed; subclasses override the `after_` methods.

    Args:
        network: to follow.
        binary_input: whether the input is binary event frames, which are spikes of `INPUT`; else it is an image, whose
            values are real, be they integers or not.
    """

    def __init__(self, network: nn.Module, binary_input: bool = False) -> None:
        super().__init__()
        self._network = network
        self._binary_input = binary_input
        # None for constants. A weak reference keeps the storage's identity from being given to another tensor, but not
        # its memory.
        self._origins: dict[_Key, Origin | None] = {}
        self._without_storage: list[Tensor] = []
        self._running: list[str] = []
        self._call: _Call | None = None

    def after_operation(self, operation: Operation) -> None:
        """Called after each operation outside neurons and gates, before its results have an origin."""

    def after_neuron(self, name: str, fed_by: Origin | None) -> None:
        """Called after each call of a neuron; `fed_by` is None where its input does not depend on the image."""

    def before_emission(self, current: Tensor, emitted: Tensor, bound: int) -> None:
        """Called at the end of each call of a neuron, as a part of it, with its spikes or integers up to `bound`."""

    def after_layer(self, name: str, fed_by: Origin | None) -> None:
        """Called after each call of a convolution or linear layer."""

    def after_reading(self, name: str) -> None:
        """Called when values that depend on spikes become numbers or shapes of Python."""

    @torch.no_grad()
    def follow(self, images: Tensor) -> Any:
        """Run the network once and return its outputs. Spiking units call their parts one by one meanwhile.

        Raises:
            ValueError: the input should be binary event frames and is not.
        """
        # What a network keeps from one call to the next keeps its origin.
        kept = {key: origin for key, origin in self._origins.items() if origin is not None and _is_alive(key)}
        self._origins, self._without_storage = {}, []
        for tensor in (*self._network.parameters(), *self._network.buffers()):
            self._set(tensor, None)
        self._origins |= kept
        self._set(images, _binary_frames(images) if self._binary_input else Origin("image"))
        with self._watching(), _Readers(self), self:
            return self._network(images)

    @property
    def keeps_state(self) -> bool:
        """Whether tensors that depend on spikes have outlived the pass."""
        return any(o is not None and o.kind != "image" and _is_alive(key) for key, o in self._origins.items())

    def origin(self, tensor: Tensor) -> Origin | None:
        """Where a tensor comes from; None if it does not depend on the image."""
        origin = self._look(tensor)
        return None if origin is FOREIGN else origin

    @property
    def module(self) -> str:
        """Name of the innermost module that runs."""
        return self._running[-1] if self._running else ""

    def note_reader(self, name: str, tensor: Tensor) -> None:
        """Called before Python, or code that Python hands an address to, reads a tensor without an operation."""
        origin = self.origin(tensor)
        if self._call is not None and not self._call.is_layer:
            # Native kernels get addresses: of a neuron's membrane there is no other trace.
            if self._key(tensor) not in self._call.storages:
                self._call.reads += origins([origin])
        elif origin is not None and origin.kind != "image":
            self.after_reading(f"{name} in {self.module}" if self.module else name)

    def _look(self, tensor: Tensor) -> Origin | None:
        return self._origins.get(self._key(tensor), FOREIGN)

    def _key(self, tensor: Tensor) -> _Key:
        if tensor.layout is torch.strided:
            return StorageWeakRef(tensor.untyped_storage())
        self._without_storage.append(tensor)  # keeps its id from being given to another one
        return id(tensor)

    def _set(self, tensor: Tensor, origin: Origin | None) -> None:
        self._origins[self._key(tensor)] = origin

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with ExitStack() as stack:

            def hook(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
                # What hooks of others do is an operation before or after the module.
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after, prepend=True, with_kwargs=True).remove)

            for name, module in self._network.named_modules():
                hook(module, self._push(name), self._pop)
                # A subclass, or methods of its own, could compute anything: it is the operations that it runs.
                kind = None if own_methods(module) else type(module)
                if kind in NEURONS or kind in GATES:
                    hook(module, self._enter(is_layer=False), self._leave(name))
                elif kind in LAYERS:
                    hook(module, self._enter(is_layer=True), self._leave(name))
            yield

    def _push(self, name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: self._running.append(name)

    def _pop(self, module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        self._running.pop()

    def _enter(self, is_layer: bool) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._call is None:
                given = _tensors((args, kwargs))
                self._call = _Call(is_layer, tuple(map(self._look, given)), frozenset(map(self._key, given)))
            self._call.depth += 1

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, kwargs: Any, output: Tensor) -> None:
            call = self._call
            assert call is not None
            call.depth -= 1
            if call.depth:
                return
            bound = 1 if isinstance(module, ThermometerNode) else int(getattr(module, "bound", 0))
            if type(module) in NEURONS:
                self.before_emission(_tensors((inputs, kwargs))[0], output, bound)
            self._call = None
            if isinstance(module, nn.Conv2d | nn.Linear):
                weights = [self._look(tensor) for tensor in (module.weight, module.bias) if tensor is not None]
                self.after_layer(name, call.inputs[0])
                self._set(output, weighted(name, call.inputs[0], weights))
            elif isinstance(module, Gate | LearnedGate):
                self._after_gate(module, call, output)
            else:
                known = origins([*call.inputs, *call.reads])
                fed_by = derive("addition", "neuron", known) if len(known) > 1 else None
                self.after_neuron(name, fed_by or next(iter(known), None))
                self._set(output, Origin("spikes", (name,), output.shape[0], bound))

        return leave

    def _after_gate(self, gate: Gate | LearnedGate, call: _Call, joined: Tensor) -> None:
        name = f"gate {gate.name}" if isinstance(gate, Gate) else "gate bsg_star"
        inputs = (*call.inputs, *call.reads)
        output = None
        if any(inputs):
            output = derive("other", name, inputs) if call.reads else gated(name, inputs)
            self.after_operation(Operation(name, (), joined, origins(inputs), output, in_layer=False))
        self._set(joined, output)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._call is None or self._call.is_layer:
            self._follow_operation(func, args, kwargs or {}, result)
        else:
            others = [tensor for tensor in _tensors((args, kwargs)) if self._key(tensor) not in self._call.storages]
            self._call.reads += origins([self.origin(tensor) for tensor in others])
        return result

    def _follow_operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        given, outputs = _given(func, name, args, kwargs), [*_tensors(result), *_written(func, args, kwargs)]
        inputs = [self._look(tensor) for tensor in given]
        known = [origin for origin in inputs if origin is not None and origin is not FOREIGN]
        if not known or name in READS_SHAPE:
            if FOREIGN not in inputs or name in READS_SHAPE or name == "lift_fresh":
                for tensor in outputs:
                    self._set(tensor, None)
            return
        rule = rule_of(name, func._overloadname, args, kwargs)
        if self._call is not None and self._call.inputs[0] is not None:
            output = self._call.inputs[0]
        elif name == "index_select":
            # Which values are taken must not depend on spikes.
            rule = "selection" if inputs[1] is None else "other"
            output = derive(rule, name, inputs[:1] if rule == "selection" else inputs, self.module)
        else:
            plus = rule == "addition" and not isinstance(args[1], Tensor) and args[1] != 0
            output = derive(rule, name, [*inputs, None] if plus else inputs, self.module)
            if outputs and rounded(output, outputs[0].dtype):
                output = derive("other", name, inputs, self.module)
        if _reads_values(func, name, args) and any(origin.kind != "image" for origin in known):
            self.after_reading(f"operation {name} in {self.module}" if self.module else f"operation {name}")
        self.after_operation(Operation(name, args, result, origins(inputs), output, self._call is not None))
        if rule == "view" and not func._schema.is_mutable:
            return
        for position, tensor in enumerate(outputs):
            indices = name == "max_pool2d_with_indices" and position == 1
            self._set(tensor, derive("other", name, inputs, self.module) if indices else output)


class _Readers(TorchFunctionMode):
    """Tells a flow of tensors whose values Python reads."""

    def __init__(self, flow: SpikeFlow) -> None:
        super().__init__()
        self._flow = flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READERS:
            self._flow.note_reader(name, args[0])
        return func(*args, **(kwargs or {}))


def _binary_frames(frames: Tensor) -> Origin:
    """The origin of event frames of 0 and 1."""
    if frames.ndim != 5:
        raise ValueError(
            f"binary_input: the shape is {tuple(frames.shape)}, expected event frames [T, B, C, H, W]; leave it out "
            "for images"
        )
    if not frames.is_meta and not ((frames == 0) | (frames == 1)).all():
        wrong = frames[(frames != 0) & (frames != 1)][0].item()
        raise ValueError(
            f"binary_input: the frames hold {wrong:g}, expected 0 and 1; use the representation binary, or leave "
            "binary_input out"
        )
    return Origin("spikes", (INPUT,), frames.shape[0], 1)


def own_methods(module: nn.Module) -> tuple[str, ...]:
    """Methods of its class that were replaced on the module itself."""
    return tuple(name for name in vars(module) if callable(getattr(type(module), name, None)))


def _is_alive(key: _Key) -> bool:
    return isinstance(key, StorageWeakRef) and not key.expired()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _given(func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors whose values an operation reads."""
    if name == "copy_" and is_whole(args[0]):
        return [args[1]]  # nothing is left of what was there
    overwritten = {argument.name for argument in func._schema.arguments if argument.is_out}
    return _tensors((args, {key: value for key, value in kwargs.items() if key not in overwritten}))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Arguments that an operation changes."""
    if not func._schema.is_mutable:
        return []
    changed = {argument.name for argument in func._schema.arguments if argument.is_write}
    named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
    return _tensors([value for name, value in (*named, *kwargs.items()) if name in changed])


def _reads_values(func: Any, name: str, args: Any) -> bool:
    """Whether values decide on the result's shape, or become a number of Python."""
    if name == "index":
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    return not _READS_VALUES.isdisjoint(func.tags)
