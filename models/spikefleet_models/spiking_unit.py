"""The repeating unit of every family: batch norm, neuron and, in a residual block, the gate.

The convolution is not part of the unit:

    plain      S = SN(BN(z))
    gated      Y = gate(SN(BN(z)), X)                  SG and SEW ResNet
    post_add   S = SN(BN(z) + X)                       Spiking ResNet

`SpikingUnit` owns parameters and state (`bn`, `neuron`, `gate`); its forward can be computed in five ways without any
change to a network or a state dict:

* triton (on CUDA, where Triton is installed): kernels/triton_unit.py, which has the same contract in three launches;
  not for a neuron that keeps its state;
* native (on the CPU, where there is a C++ compiler, unless SPIKEFLEET_KERNELS=lean): kernels/native_unit.py, which has
  it in one call;
* lean (elsewhere): one autograd Function that saves the convolution's output z, the batch statistics and (where its
  backward reads it) the shortcut, and recomputes normalisation, membrane and spikes tile by tile in backward;
* modules: `bn`, `neuron` and `gate` called one after the other. Used where neither of these applies: another
  kind of normalisation (SyncBatchNorm) or none, gradients in eval mode, I-LIF elsewhere than in the native form,
  hooks on one of the modules;
* reference: the formulas with plain autograd, torch's native batch norm and SpikingJelly's step equations, for tests
  and benchmarks.

Batch statistics are shared over T, B, H and W, merged as in the SEW ResNet code. Normalisation and membrane are fp32
whatever the type of z, and spikes are returned in the type of z.
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spikefleet_models.gates import (
    Gate,
    LearnedGate,
    gate_backward_residual,
    gate_backward_shortcut,
    gate_bound,
    gate_forward,
)
from spikefleet_models.kernels import Implementation, load_native_unit, load_triton_unit, wants_native
from spikefleet_models.membrane import (
    Dynamics,
    IntegerDynamics,
    backward_steps,
    charge_steps,
    forward_steps,
    membrane_dtype,
    tiles,
)
from spikefleet_models.neurons import ILIF, SpikingNode
from spikefleet_models.packed_spikes import note_spikes, noted_bound
from spikefleet_models.unit_spec import UnitSpec

_Form = Callable[..., Any]
"""(z, gamma, beta, shortcut, w, spec, v[0] or nothing) -> spikes, or (spikes, v[T])."""

aten = torch.ops.aten


class SpikingUnit(nn.Module):
    """Batch norm and neuron over [T, B, C, H, W] (or [B, C, H, W], repeated over T), then gate or post-addition.

    Args:
        bn: normalises z [T * B, C, H, W].
        neuron: multi-step node; or ReLU for the ANN twin, which has neither gate nor membrane.
        timesteps: T of static input, and of sequences that are given without their own.
        gate: combines the spikes with the shortcut spikes.
        post_add: add the shortcut to the currents before the neuron, instead of a gate.

    Raises:
        ValueError: a gate other than ADD behind I-LIF neurons that emit more than 1.
    """

    def __init__(
        self,
        bn: nn.Module,
        neuron: SpikingNode | nn.ReLU,
        timesteps: int,
        gate: Gate | LearnedGate | None = None,
        post_add: bool = False,
    ) -> None:
        super().__init__()
        adds = isinstance(gate, Gate) and gate.name == "add"
        if isinstance(neuron, ILIF) and neuron.bound > 1 and gate is not None and not adds:
            name = gate.name if isinstance(gate, Gate) else "bsg_star"
            raise ValueError(
                f"the gate {name} needs binary spikes, but I-LIF neurons with bound={neuron.bound} emit integers; "
                "set neuron.bound=1"
            )
        self.bn = bn
        self.neuron = neuron
        self.gate = gate
        self.timesteps = timesteps
        self.post_add = post_add
        self.implementation: Implementation = "auto"

    def forward(self, z: Tensor, shortcut: Tensor | None = None, timesteps: int | None = None) -> Tensor:
        """Compute spikes [T, B, C, H, W].

        Args:
            z: output of the convolution, [T * B, C, H, W]; for a static [B, C, H, W] call `repeat_over_time`.
            shortcut: spikes for the gate, or currents for post-addition, [T, B, C, H, W].
            timesteps: T of z; by default the unit's own.
        """
        return self._forward(z, shortcut, timesteps or self.timesteps, repeat=False)

    def repeat_over_time(self, z: Tensor) -> Tensor:
        """Compute spikes [T, B, C, H, W] of a static z [B, C, H, W] that is the current at each of the T steps."""
        return self._forward(z, None, self.timesteps, repeat=True)

    def _forward(self, z: Tensor, shortcut: Tensor | None, timesteps: int, repeat: bool) -> Tensor:
        if isinstance(self.neuron, nn.ReLU):
            return self._analogue(z, shortcut, 1 if repeat else timesteps)
        reference = self.implementation == "reference"
        fuses = not reference and self._lean_applies(z, self.neuron)
        spikes = self._fused(z, shortcut, timesteps, repeat) if fuses else None
        return self._compose(z, shortcut, timesteps, repeat, reference) if spikes is None else spikes

    def _fused(self, z: Tensor, shortcut: Tensor | None, timesteps: int, repeat: bool) -> Tensor | None:
        """The spikes by the fused form for this call; None where there is none, which changes nothing."""
        node = self.neuron
        assert isinstance(self.bn, nn.BatchNorm2d)
        assert not isinstance(node, nn.ReLU)
        spec = UnitSpec(
            self.bn,
            node.dynamics(),
            self.gate.name if isinstance(self.gate, Gate) else None,
            "literal" if self.gate is None else self.gate.gradient,
            self.post_add,
            timesteps,
            repeat,
        )
        fused_shortcut = None if isinstance(self.gate, LearnedGate) else shortcut
        v_init = node.kept_voltage(spec.sequence(z)) if node.keep_state else None
        form = self._form(z, fused_shortcut, spec, v_init)
        if form is None:
            return None
        if self.bn.training and self.bn.num_batches_tracked is not None:
            self.bn.num_batches_tracked.add_(1)
        arguments = (z, self.bn.weight, self.bn.bias, fused_shortcut, getattr(node, "w", None), spec)
        spikes: Tensor
        if v_init is None:
            spikes = form(*arguments)
        else:
            spikes, node.v = form(*arguments, v_init)
        joins = isinstance(self.gate, Gate)
        note_spikes(spikes, gate_bound(self.gate, node.bound, noted_bound(shortcut)) if joins else node.bound)
        if isinstance(self.gate, LearnedGate):
            assert shortcut is not None
            spikes = self.gate(spikes, shortcut)
        return spikes

    def _form(self, z: Tensor, shortcut: Tensor | None, spec: UnitSpec, v_init: Tensor | None) -> _Form | None:
        """The function that computes a call; None where I-LIF has no fused form."""
        binary = not isinstance(spec.dynamics, IntegerDynamics)
        unit = self._triton_unit(z, spec) if binary and v_init is None else None
        unit = unit or self._native_unit(z, shortcut, spec, v_init)
        if unit is not None:
            native_or_triton: _Form = unit.apply
            return native_or_triton
        return lean_unit if binary else None

    def _triton_unit(self, z: Tensor, spec: UnitSpec) -> ModuleType | None:
        """The module of the Triton form where it is the one to use."""
        named = self.implementation == "triton"
        # torch.compile traces the lean form's tensor operations; it knows nothing of these launches.
        if not named and (self.implementation != "auto" or not z.is_cuda or torch.compiler.is_compiling()):
            return None
        unit = load_triton_unit()
        reason = "Triton is not installed" if unit is None else unit.problem(z, spec)
        if named and reason is not None:
            raise RuntimeError(f"the Triton form cannot be used: {reason}; set use_implementation(model, 'auto')")
        return unit if reason is None else None

    def _native_unit(
        self, z: Tensor, shortcut: Tensor | None, spec: UnitSpec, v_init: Tensor | None
    ) -> ModuleType | None:
        """The module of the native form where it is the one to use."""
        if not wants_native(self.implementation, z.device):
            return None
        unit = load_native_unit()
        return unit if unit.problem(z, shortcut, spec, v_init) is None else None

    def _analogue(self, z: Tensor, shortcut: Tensor | None, timesteps: int) -> Tensor:
        x: Tensor = self.bn(z).unflatten(0, (timesteps, -1))
        if self.post_add:
            assert shortcut is not None
            x = x + shortcut
        activated: Tensor = self.neuron(x)
        return activated

    def _lean_applies(self, z: Tensor, node: SpikingNode) -> bool:
        bn = self.bn
        plain_bn = type(bn) is nn.BatchNorm2d and bn.affine and bn.track_running_stats and bn.momentum is not None
        observed = any(
            module is not None and (module._forward_hooks or module._forward_pre_hooks)
            for module in (bn, node, self.gate)
        )
        frozen = not bn.training and torch.is_grad_enabled() and (z.requires_grad or _any_requires_grad(self))
        return plain_bn and not observed and not frozen and not node.store_v_seq

    def _compose(self, z: Tensor, shortcut: Tensor | None, timesteps: int, repeat: bool, reference: bool) -> Tensor:
        assert not isinstance(self.neuron, nn.ReLU)
        # cuDNN's batch norm, which torch takes on CUDA, rounds otherwise than the fused forms: an observed unit would
        # emit other spikes. I-LIF has no fused form.
        native = z.is_cuda and (reference or not isinstance(self.neuron, ILIF))
        with torch.backends.cudnn.flags(enabled=False) if native else nullcontext():
            x = self.bn(z.to(membrane_dtype(z.dtype)))
        x = x.unsqueeze(0).expand(timesteps, *x.shape) if repeat else x.unflatten(0, (timesteps, -1))
        if self.post_add:
            assert shortcut is not None
            x = x + shortcut
        emitted = self.neuron.reference_forward(x) if reference else self.neuron(x)
        spikes: Tensor = emitted.to(z.dtype)
        note_spikes(spikes, self.neuron.bound if reference else noted_bound(emitted))
        if self.gate is None:
            return spikes
        assert shortcut is not None
        return self.gate.reference_forward(spikes, shortcut) if reference else self.gate(spikes, shortcut)


def use_implementation(model: nn.Module, implementation: Implementation) -> None:
    """Choose the form of every spiking unit, and of every I-LIF layer alone, of a network; the weights do not change.

    Args:
        model: the network.
        implementation: "auto" (Triton on CUDA where it applies; on the CPU native where it can be compiled, unless
            SPIKEFLEET_KERNELS is lean; else lean), "lean", "triton" (refused where it does not apply, when the unit
            runs), "native" (refused where the machine cannot compile it, when the unit runs; lean where it does not
            apply) or "reference".

    Raises:
        ValueError: there is no such form.
    """
    if implementation not in get_args(Implementation):
        allowed = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation is {implementation!r}, expected one of {allowed}")
    for module in model.modules():
        if isinstance(module, SpikingUnit | ILIF):
            module.implementation = implementation


def _any_requires_grad(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def lean_unit(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shortcut: Tensor | None,
    w: Tensor | None,
    spec: UnitSpec,
    v_init: Tensor | None = None,
) -> Any:
    """Compute spikes [T, B, C, H, W] by the lean form; arguments and results are those of the native `apply`."""
    return _UnitFunction.apply(z, gamma, beta, shortcut, w, spec, v_init)


class _UnitFunction(torch.autograd.Function):
    """(z, gamma, beta, shortcut, w) -> spikes; with v[0], which is saved too, -> (spikes, v[T]).

    The module docstring lists what is saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        gamma: Tensor,
        beta: Tensor,
        shortcut: Tensor | None,
        w: Tensor | None,
        spec: UnitSpec,
        v_init: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        bn, dtype = spec.bn, membrane_dtype(z.dtype)
        assert isinstance(spec.dynamics, Dynamics)
        x, mean, invstd = aten.native_batch_norm(
            z.to(dtype), gamma, beta, bn.running_mean, bn.running_var, bn.training, bn.momentum, bn.eps
        )
        q = None if w is None else w.to(dtype).sigmoid()
        x_seq = spec.sequence(x)
        # Spikes take the place of the currents where they fit.
        in_place = not spec.repeat and z.dtype == dtype
        spikes = x_seq if in_place else spec.empty_spikes(z)
        v_last = None if v_init is None else torch.empty_like(v_init)
        for part in tiles(spikes, axis=1):
            currents, out = x_seq[:, part], spikes[:, part]
            if spec.post_add:
                assert shortcut is not None
                currents = currents.add_(shortcut[:, part])
            direct = out.dtype == dtype
            fired = out if direct and spec.gate is None else torch.empty_like(out, dtype=dtype)
            v_first, v_end = (None if v is None else v[part] for v in (v_init, v_last))
            forward_steps(spec.dynamics, q, currents.unbind(), fired.unbind(), v_first, v_end)
            if spec.gate is not None:
                assert shortcut is not None
                joined = out if direct else torch.empty_like(fired)
                fired = gate_forward(spec.gate, fired, shortcut[:, part].to(dtype), joined)
            if fired is not out:
                out.copy_(fired)
        ctx.save_for_backward(z, gamma, beta, mean, invstd, shortcut if spec.saves_shortcut else None, w, v_init)
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        return spikes if v_last is None else (spikes, v_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        z, gamma, beta, mean, invstd, shortcut, w, v_init = ctx.saved_tensors
        spec: UnitSpec = ctx.spec
        grad_spikes, grad_v = (*grad_outputs, None)[:2]
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(spec.empty_spikes(z))
        dynamics, dtype = spec.dynamics, membrane_dtype(z.dtype)
        assert isinstance(dynamics, Dynamics)
        q = None if w is None else w.to(dtype).sigmoid()
        wide = z.to(dtype)
        # One buffer, tile by tile: currents, then charged membranes, then the gradient of the currents.
        grad_x = _normalise_again(wide, gamma, beta, mean, invstd)
        seq = spec.sequence(grad_x)
        grad_shortcut = None if shortcut is None else torch.empty_like(shortcut)
        grad_v_init = None if v_init is None else torch.empty_like(v_init)
        grad_q: Tensor | None = None
        for part in tiles(grad_spikes, axis=1):
            h = seq[:, part]
            if spec.repeat:
                h = torch.empty_like(grad_spikes[:, part], dtype=dtype).copy_(h)
            if spec.post_add:
                h.add_(shortcut[:, part])
            currents = h if q is None else h.clone()
            v_first, grad_end = (None if v is None else v[part] for v in (v_init, grad_v))
            charge_steps(dynamics, q, h.unbind(), v_first)
            grad_s = grad_spikes[:, part].to(dtype)
            if spec.gate is not None and grad_shortcut is not None:
                fired = torch.ge(h, dynamics.v_threshold, out=torch.empty_like(h))
                to_shortcut = grad_shortcut[:, part]
                if to_shortcut.dtype == dtype:
                    gate_backward_shortcut(spec.gate, grad_s, fired, to_shortcut)
                else:
                    to_shortcut.copy_(gate_backward_shortcut(spec.gate, grad_s, fired, torch.empty_like(h)))
                joined = shortcut[:, part].to(dtype)
                grad_s = gate_backward_residual(spec.gate, grad_s, fired, joined, spec.gate_gradient)
            to_v_init, tile_grad_q = backward_steps(
                dynamics, q, h.unbind(), grad_s.unbind(), grad_end, v_first, currents.unbind()
            )
            if grad_v_init is not None:
                grad_v_init[part] = to_v_init
            if tile_grad_q is not None:
                grad_q = tile_grad_q if grad_q is None else grad_q + tile_grad_q
            if spec.post_add and grad_shortcut is not None:
                grad_shortcut[:, part] = h
            if spec.repeat:
                grad_x[part] = h.sum(0)
        grad_z, grad_gamma, grad_beta = aten.native_batch_norm_backward(
            grad_x, wide, gamma, None, None, mean, invstd, True, spec.bn.eps, [True, True, True]
        )
        grad_w = None if grad_q is None or q is None else grad_q * q * (1 - q)
        if spec.gate == "add":
            grad_shortcut = grad_spikes
        return grad_z.to(z.dtype), grad_gamma, grad_beta, grad_shortcut, grad_w, None, grad_v_init


def _normalise_again(z: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """BN(z) with known statistics, bit-equal to torch's training kernel."""
    if z.is_cuda:
        return torch.batch_norm_elemt(z, gamma, beta, mean, invstd, 0.0)
    scale = invstd * gamma
    shift = torch.addcmul(beta, mean, scale, value=-1.0)
    # Eval-mode batch norm with mean 0 and variance 1 is torch's fastest scale-and-shift by channel.
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    x: Tensor = aten.native_batch_norm(z, scale, shift, zero, one, False, 0.0, 0.0)[0]
    return x
