"""IF, LIF, PLIF and I-LIF neurons: SpikingJelly nodes whose multi-step forward saves almost nothing for backward.

The nodes subclass SpikingJelly's, so `functional.reset_net`, its monitors and its converters work with them. They
differ in three ways:

* The membrane is fp32 whatever the input's type (SpikingJelly keeps a 16-bit membrane under autocast); spikes are
  returned in the input's type.
* Each multi-step call starts from the reset state unless `keep_state` is set, so no state leaks from one batch into
  the next and training needs no `reset_net`.
* The backward of IF, LIF and PLIF recomputes the membrane (membrane.py) where SpikingJelly saves it; I-LIF saves one
  byte per element.

I-LIF (Luo et al., "Integer-valued training and spike-driven inference spiking neural network for high-performance and
energy-efficient object detection", ECCV 2024, eqs 8 to 11) emits integers 0..D:

    u[t] = leak * (u[t-1] - s[t-1]) + input_scale * x[t]        u[0] = input_scale * x[0]
    s[t] = round(clip(u[t], 0, D)), halves to the even integer

with gradient 1 of s[t] to u[t] on [0, D], both ends included, and 0 elsewhere; s[t-1] in the reset carries no gradient.
The released code fixes what the paper leaves open: leak 0.25 on COCO; leak 0.5 and input_scale 0.5 on Gen1.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spikefleet_models.kernels import Implementation, load_native_integers, wants_native
from spikefleet_models.membrane import (
    Dynamics,
    IntegerDynamics,
    backward_steps,
    charge_steps,
    forward_steps,
    membrane_dtype,
    tiles,
)
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.packed_spikes import note_spikes
from spikefleet_models.surrogates import build_surrogate


class _MembraneFunction(torch.autograd.Function):
    """(x_seq, v_init or None, w or None) -> (spikes, v[T] or None); saves its inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, x_seq: Tensor, v_init: Tensor | None, w: Tensor | None, dynamics: Dynamics) -> Any:
        ctx.dynamics = dynamics
        ctx.save_for_backward(x_seq, v_init, w)
        ctx.set_materialize_grads(False)
        dtype = membrane_dtype(x_seq.dtype)
        q = None if w is None else w.to(dtype).sigmoid()
        spikes = torch.empty_like(x_seq, memory_format=torch.preserve_format)
        v_last = None if v_init is None else torch.empty_like(v_init)
        for part in tiles(x_seq, axis=1):
            x, s = x_seq[:, part].to(dtype), spikes[:, part]
            fired = s if s.dtype == dtype else torch.empty_like(x)
            if v_init is None or v_last is None:
                forward_steps(dynamics, q, x.unbind(), fired.unbind())
            else:
                forward_steps(dynamics, q, x.unbind(), fired.unbind(), v_init[part], v_last[part])
            if fired is not s:
                s.copy_(fired)
        return spikes, v_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_spikes, grad_v = grad_outputs
        x_seq, v_init, w = ctx.saved_tensors
        dynamics: Dynamics = ctx.dynamics
        dtype = membrane_dtype(x_seq.dtype)
        q = None if w is None else w.to(dtype).sigmoid()
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(x_seq)
        grad_x = torch.empty_like(x_seq)
        grad_v_init = None if v_init is None else torch.empty_like(v_init)
        grad_w: Tensor | None = None
        for part in tiles(x_seq, axis=1):
            x, v0 = x_seq[:, part].to(dtype), None if v_init is None else v_init[part]
            h = x.clone()
            charge_steps(dynamics, q, h.unbind(), v0)
            carry, grad_q = backward_steps(
                dynamics,
                q,
                h.unbind(),
                grad_spikes[:, part].to(dtype).unbind(),
                grad_v=None if grad_v is None else grad_v[part],
                v_init=v0,
                currents=x.unbind(),
            )
            grad_x[:, part] = h
            if grad_v_init is not None:
                grad_v_init[part] = carry
            if grad_q is not None and q is not None:
                grad_w = grad_q * q * (1 - q) if grad_w is None else grad_w + grad_q * q * (1 - q)
        return grad_x, grad_v_init, grad_w, None


class _IntegerFunction(torch.autograd.Function):
    """I-LIF: (x_seq, v_init or None) -> (integers, v[T] or None); saves where u[t] was in [0, D], a byte each."""

    @staticmethod
    def forward(
        ctx: Any, x_seq: Tensor, v_init: Tensor | None, bound: int, leak: float, input_scale: float
    ) -> tuple[Tensor, Tensor | None]:
        ctx.leak, ctx.input_scale = leak, input_scale
        ctx.has_state = v_init is not None
        ctx.set_materialize_grads(False)
        emitted = torch.empty_like(x_seq, memory_format=torch.preserve_format)
        trains = any(ctx.needs_input_grad)
        inside = torch.empty_like(x_seq, dtype=torch.bool, memory_format=torch.preserve_format) if trains else None
        v_last = None if v_init is None else torch.empty_like(v_init)
        steps, dtype = x_seq.shape[0], membrane_dtype(x_seq.dtype)
        # A single step has no dynamics: clip and round are exact in any type that holds the input and D.
        if steps == 1 and v_init is None and input_scale == 1.0:
            dtype = x_seq.dtype
        for part in tiles(x_seq, axis=1):
            v = None if v_init is None else v_init[part] * leak
            for t in range(steps):
                u = x_seq[t, part].to(dtype)
                if input_scale != 1.0:
                    u = u * input_scale
                if v is not None:
                    u = v.add_(u)
                s = emitted[t, part]
                clipped = torch.clamp(u, 0, bound, out=s) if s.dtype == dtype else torch.clamp(u, 0, bound)
                if inside is not None:
                    torch.eq(u, clipped, out=inside[t, part])
                clipped.round_()
                if clipped is not s:
                    s.copy_(clipped)
                if t + 1 < steps:
                    v = torch.sub(u, clipped).mul_(leak)
                elif v_last is not None:
                    torch.sub(u, clipped, out=v_last[part])
        if inside is not None:
            note_spikes(inside, 1)
            ctx.save_for_backward(inside)
        return emitted, v_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_emitted, grad_v = grad_outputs
        (inside,) = ctx.saved_tensors
        steps = inside.shape[0]
        given = grad_v if grad_emitted is None else grad_emitted
        grad_x = torch.empty_like(inside, dtype=given.dtype, memory_format=torch.preserve_format)
        grad_v_init = torch.empty_like(grad_x[0], dtype=membrane_dtype(given.dtype)) if ctx.has_state else None
        for part in tiles(inside, axis=1):
            carry = None if grad_v is None else grad_v[part]
            for t in reversed(range(steps)):
                grad_u = carry
                if grad_emitted is not None:
                    grad_u = grad_emitted[t, part] * inside[t, part]
                    if carry is not None:
                        grad_u = carry.add(grad_u)
                elif grad_u is None:
                    grad_u = torch.zeros_like(grad_x[t, part])
                grad_x[t, part] = grad_u if ctx.input_scale == 1.0 else grad_u * ctx.input_scale
                if t or grad_v_init is not None:
                    carry = grad_u.to(membrane_dtype(grad_u.dtype)) * ctx.leak
            if grad_v_init is not None:
                assert carry is not None
                grad_v_init[part] = carry
        return grad_x, grad_v_init, None, None, None


def lean_integers(x_seq: Tensor, v: Tensor | None, dynamics: IntegerDynamics) -> tuple[Tensor, Tensor | None]:
    """Compute I-LIF's integers [T, ...] of currents [T, ...] from v[0] or rest, and v[T] where v[0] is given."""
    emitted, v_last = _IntegerFunction.apply(x_seq, v, dynamics.bound, dynamics.leak, dynamics.input_scale)
    return emitted, v_last


class _LeanNode(neuron.BaseNode):
    """Base of the nodes: state handling around an autograd Function."""

    bound: int
    """Largest value that a neuron emits in one step; the smallest is 0."""
    keep_state: bool = False
    """Carry the voltage from one call to the next, as SpikingJelly does; `functional.reset_net` clears it."""

    def _run(self, x_seq: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(currents, v[0] or None) -> (emitted, v[T] or None)."""
        raise NotImplementedError

    def materialize_states(self, inputs: tuple[Any, ...], states: tuple[Any, ...], step_mode: str) -> tuple[Any, ...]:
        """Materialise the states as SpikingJelly does, with an fp32 voltage for every input type."""
        first = inputs[0][0] if step_mode == "m" else inputs[0]
        (v,) = super().materialize_states((first.to(membrane_dtype(first.dtype)),), states, "s")
        return (v,)

    def multi_step_forward(self, x_seq: Tensor, *args: Tensor, **kwargs: object) -> Tensor:
        """Run all steps: [T, ...] currents -> [T, ...] spikes (I-LIF: integers in [0, D]) of the same type."""
        if not self.keep_state and not self.store_v_seq:
            emitted = self._run(x_seq, None)[0]
            note_spikes(emitted, self.bound)
            return emitted
        if not self.keep_state:
            self.reset()
        if self.store_v_seq:
            recorded: Tensor = super().multi_step_forward(x_seq)
            return recorded.to(x_seq.dtype)
        emitted, self.v = self._run(x_seq, self.kept_voltage(x_seq))
        note_spikes(emitted, self.bound)
        return emitted

    def kept_voltage(self, x_seq: Tensor) -> Tensor:
        """The voltage v[0] [B, ...] that a call on [T, B, ...] starts from where the node keeps its state."""
        v: Tensor = self.materialize_states((x_seq,), (self.v,), "m")[0]
        return v

    def reference_forward(self, x_seq: Tensor) -> Tensor:
        """Run all steps by SpikingJelly's step equations (I-LIF: eqs 8 to 11) with plain autograd.

        They start from the kept state where the node keeps it, else from the reset state.
        """
        states = self.materialize_states((x_seq,), (self.v if self.keep_state else self.get_reset_value("v"),), "m")
        currents = x_seq.to(membrane_dtype(x_seq.dtype))
        steps = []
        for x in currents:
            (spike,), states = self.single_step_functional_forward((x,), states)
            steps.append(spike)
        if self.keep_state:
            (self.v,) = states
        return torch.stack(steps).to(x_seq.dtype)


class _BinaryNode(_LeanNode):
    """Base of IF, LIF and PLIF."""

    bound = 1
    """Largest value that a neuron emits in one step; D for I-LIF."""

    def dynamics(self) -> Dynamics:
        """The parameters of the step equations."""
        return Dynamics(
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            detach_reset=self.detach_reset,
            decay_input=getattr(self, "decay_input", True),
            tau=getattr(self, "tau", None),
            surrogate_function=self.surrogate_function,
        )

    def _run(self, x_seq: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if x_seq.ndim == 1:
            spikes, v_last = self._run(x_seq[:, None], None if v is None else v[None])
            return spikes[:, 0], None if v_last is None else v_last[0]
        spikes, v_last = _MembraneFunction.apply(x_seq, v, getattr(self, "w", None), self.dynamics())
        return spikes, v_last


class IF(_BinaryNode, neuron.IFNode):
    """Integrate-and-fire."""


class LIF(_BinaryNode, neuron.LIFNode):
    """Leaky integrate-and-fire."""


class PLIF(_BinaryNode, neuron.ParametricLIFNode):
    """Parametric LIF: 1/tau = sigmoid(w) with one learned w per layer."""


class ILIF(_LeanNode):
    """Integer leaky integrate-and-fire: equations in the module docstring.

    Args:
        bound: D.
        leak: fraction of the membrane kept after a step.
        input_scale: factor on the input.
        step_mode: as in SpikingJelly; "m" takes [T, ...].
    """

    def __init__(
        self, bound: int = 4, leak: float = 0.25, input_scale: float = 1.0, step_mode: Literal["s", "m"] = "m"
    ) -> None:
        super().__init__(
            v_reset=None,
            surrogate_function=surrogate.MultiLevelSpikeCount(bound),
            detach_reset=True,
            step_mode=step_mode,
        )
        self.bound = bound
        self.leak = leak
        self.input_scale = input_scale
        self.implementation: Implementation = "auto"

    def dynamics(self) -> IntegerDynamics:
        """The parameters of the step equations."""
        return IntegerDynamics(self.bound, self.leak, self.input_scale)

    def single_step_functional_forward(
        self, inputs: tuple[Any, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Run one step with plain autograd: ((x[t],), (v[t-1],)) -> ((s[t],), (v[t],)) with v = u - s."""
        u = states[0] * self.leak + inputs[0] * self.input_scale
        # The gradient is 1 on all of [0, D], its ends included, where torch's clamp may pass none;
        # round(c) - c is exact, so the sum is round(c).
        inside = (u >= 0) & (u <= self.bound)
        clipped = torch.where(inside, u, u.detach().clamp(0, self.bound))
        emitted = clipped + (clipped.round() - clipped).detach()
        return (emitted,), (u - emitted.detach(), *states[1:])

    def _run(self, x_seq: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if x_seq.ndim == 1:
            emitted, v_last = self._run(x_seq[:, None], None if v is None else v[None])
            return emitted[:, 0], None if v_last is None else v_last[0]
        if wants_native(self.implementation, x_seq.device):
            native = load_native_integers()
            if native.problem(x_seq, v) is None:
                computed: tuple[Tensor, Tensor | None] = native.apply(x_seq, v, self.dynamics())
                return computed
        return lean_integers(x_seq, v, self.dynamics())

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"bound={self.bound}, leak={self.leak}, input_scale={self.input_scale}, step_mode={self.step_mode}"


SpikingNode = IF | LIF | PLIF | ILIF


def node_arguments(config: NeuronConfig) -> dict[str, Any]:
    """Keyword arguments of the node of a config; SpikingJelly's IF, LIF and PLIF nodes take the same ones."""
    if config.kind == "ilif":
        return {"bound": config.bound, "leak": config.leak, "input_scale": config.input_scale, "step_mode": "m"}
    arguments: dict[str, Any] = {
        "v_threshold": config.v_threshold,
        "v_reset": config.v_reset,
        "surrogate_function": build_surrogate(config),
        "detach_reset": config.detach_reset,
        "step_mode": "m",
    }
    if config.kind != "if":
        arguments["init_tau" if config.kind == "plif" else "tau"] = config.tau
        arguments["decay_input"] = config.decay_input
    return arguments


def build_neuron(config: NeuronConfig) -> SpikingNode:
    """Build a multi-step node: [T, ...] currents -> [T, ...] spikes, or integers in [0, D]."""
    kinds: dict[str, Callable[..., SpikingNode]] = {"if": IF, "lif": LIF, "plif": PLIF, "ilif": ILIF}
    return kinds[config.kind](**node_arguments(config))


def firing_current(config: NeuronConfig) -> float:
    """Return a current with which a neuron that starts at rest fires at every step: V_th for IF at rest at 0.

    A leak that divides the input needs tau times as much, and a thousandth more against rounding.
    """
    if config.kind == "ilif":
        return config.bound / config.input_scale
    distance = config.v_threshold - (config.v_reset or 0.0)
    return distance * config.tau * 1.001 if config.kind != "if" and config.decay_input else distance


def spiking_nodes(model: nn.Module) -> dict[str, SpikingNode]:
    """Return every spiking neuron layer of a network by its module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikingNode)}
