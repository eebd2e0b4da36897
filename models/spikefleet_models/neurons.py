"""IF, LIF and PLIF neurons: SpikingJelly nodes whose multi-step forward saves only its input.

The nodes subclass SpikingJelly's, so `functional.reset_net`, its monitors and its converters treat them as its own.
They differ in three ways, all on purpose:

* The membrane is fp32 whatever the input's type (SpikingJelly keeps a 16-bit membrane under autocast); spikes come
  back in the input's type.
* Each multi-step call starts from the reset state unless `keep_state` is set, so nothing leaks from one batch into
  the next and training needs no `reset_net`.
* The backward recomputes the membrane (membrane.py) where SpikingJelly saves it.
"""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spikefleet_models.membrane import Dynamics, backward_steps, charge_steps, forward_steps, membrane_dtype
from spikefleet_models.tiles import tiles

SURROGATES: dict[str, type[surrogate.SurrogateFunctionBase]] = {
    "atan": surrogate.ATan,
    "sigmoid": surrogate.Sigmoid,
    "piecewise_quadratic": surrogate.PiecewiseQuadratic,
    "piecewise_exp": surrogate.PiecewiseExp,
    "soft_sign": surrogate.SoftSign,
    "super_spike": surrogate.SuperSpike,
    "erf": surrogate.Erf,
    "rect": surrogate.Rect,
}


class NeuronConfig(BaseModel):
    """One kind of spiking neuron. The defaults are the SG ResNet paper's on static images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["if", "lif", "plif"] = Field("if", description="IF, LIF, or PLIF (one learned tau a layer).")
    tau: float = Field(2.0, gt=1.0, description="Membrane time constant in steps; PLIF starts from it; IF has none.")
    decay_input: bool = Field(True, description="LIF and PLIF: divide the input by tau as well.")
    v_threshold: float = Field(1.0, gt=0.0, description="Firing threshold V_th.")
    v_reset: float | None = Field(0.0, description="Voltage after a spike; null subtracts V_th instead (soft reset).")
    detach_reset: bool = Field(True, description="Keep the reset out of the gradient.")
    surrogate: Literal[
        "atan", "sigmoid", "piecewise_quadratic", "piecewise_exp", "soft_sign", "super_spike", "erf", "rect"
    ] = Field("atan", description="Surrogate gradient, by SpikingJelly's name (triangle = piecewise_quadratic).")
    alpha: float = Field(2.0, gt=0.0, description="Sharpness of the surrogate gradient.")


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


class _LeanNode(neuron.BaseNode):
    """What the three nodes share: state handling around `_MembraneFunction`."""

    keep_state: bool = False
    """Carry the voltage from one call to the next, as SpikingJelly does; `functional.reset_net` clears it."""

    def dynamics(self) -> Dynamics:
        """The step equations, as plain numbers."""
        return Dynamics(
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            detach_reset=self.detach_reset,
            decay_input=getattr(self, "decay_input", True),
            tau=getattr(self, "tau", None),
            surrogate_function=self.surrogate_function,
        )

    def materialize_states(self, inputs: tuple[Any, ...], states: tuple[Any, ...], step_mode: str) -> tuple[Any, ...]:
        """SpikingJelly's, with an fp32 voltage for every input type."""
        first = inputs[0][0] if step_mode == "m" else inputs[0]
        (v,) = super().materialize_states((first.to(membrane_dtype(first.dtype)),), states, "s")
        return (v,)

    def multi_step_forward(self, x_seq: Tensor, *args: Tensor, **kwargs: object) -> Tensor:
        """[T, ...] currents -> [T, ...] spikes of the same type."""
        w = getattr(self, "w", None)
        if not self.keep_state and not self.store_v_seq:
            spikes: Tensor = _MembraneFunction.apply(x_seq, None, w, self.dynamics())[0]
            return spikes
        if not self.keep_state:
            self.reset()
        if self.store_v_seq:
            return super().multi_step_forward(x_seq)
        (v,) = self.materialize_states((x_seq,), tuple(self._memories.values()), "m")
        spikes, self.v = _MembraneFunction.apply(x_seq, v, w, self.dynamics())
        return spikes

    def reference_forward(self, x_seq: Tensor) -> Tensor:
        """The same from the reset state, by SpikingJelly's own step equations and plain autograd."""
        states = self.materialize_states((x_seq,), (self.get_reset_value("v"),), "m")
        currents = x_seq.to(membrane_dtype(x_seq.dtype))
        steps = []
        for x in currents:
            (spike,), states = self.single_step_functional_forward((x,), states)
            steps.append(spike)
        return torch.stack(steps).to(x_seq.dtype)


class IF(_LeanNode, neuron.IFNode):
    """Integrate-and-fire."""


class LIF(_LeanNode, neuron.LIFNode):
    """Leaky integrate-and-fire."""


class PLIF(_LeanNode, neuron.ParametricLIFNode):
    """LIF with 1/tau = sigmoid(w), one learned w a layer."""


SpikingNode = IF | LIF | PLIF


def build_neuron(config: NeuronConfig) -> SpikingNode:
    """A multi-step node: [T, ...] currents -> [T, ...] spikes."""
    arguments: dict[str, Any] = {
        "v_threshold": config.v_threshold,
        "v_reset": config.v_reset,
        "surrogate_function": SURROGATES[config.surrogate](alpha=config.alpha),
        "detach_reset": config.detach_reset,
        "step_mode": "m",
    }
    if config.kind == "if":
        return IF(**arguments)
    if config.kind == "lif":
        return LIF(tau=config.tau, decay_input=config.decay_input, **arguments)
    return PLIF(init_tau=config.tau, decay_input=config.decay_input, **arguments)


def spiking_nodes(model: nn.Module) -> dict[str, SpikingNode]:
    """Every spiking neuron layer of a network by its module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IF | LIF | PLIF)}
