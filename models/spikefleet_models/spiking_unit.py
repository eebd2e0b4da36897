"""The repeating unit of every family: batch norm, neuron and, in a residual block, the gate. The convolution stays outside.

    plain      S = SN(BN(z))
    gated      Y = gate(SN(BN(z)), X)                  SG and SEW ResNet
    post_add   S = SN(BN(z) + X)                       Spiking ResNet

`SpikingUnit` owns parameters and state (`bn`, `neuron`, `gate`); how its forward is computed can change without touching a
network or a state dict. Three ways exist:

* lean (default): one autograd Function that saves the convolution's output z, the batch statistics and (where its backward
  reads it) the shortcut, and recomputes normalisation, membrane and spikes tile by tile in backward;
* modules: `bn`, `neuron` and `gate` called one after the other. Taken where the lean form does not apply: another kind of
  normalisation (SyncBatchNorm), gradients in eval mode, a neuron that keeps its state, hooks on one of the modules;
* reference: the formulas with plain autograd and SpikingJelly's step equations, for tests and benchmarks.

Batch statistics are shared over T, B, H and W (spec: batch norm over merged (T, N), as in the SEW ResNet code). Whatever
the type of z, normalisation and membrane are fp32 and spikes come back in the type of z.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spikefleet_models.gates import (
    SAVES_SHORTCUT,
    Gate,
    LearnedGate,
    gate_backward_residual,
    gate_backward_shortcut,
    gate_forward,
)
from spikefleet_models.membrane import Dynamics, backward_steps, charge_steps, forward_steps, membrane_dtype
from spikefleet_models.neurons import SpikingNode
from spikefleet_models.tiles import tiles

Implementation = Literal["lean", "reference"]

aten = torch.ops.aten


class SpikingUnit(nn.Module):
    """Batch norm and neuron over [T, B, C, H, W] (or [B, C, H, W], repeated over T), then gate or post-addition.

    Args:
        bn: normalises z [T * B, C, H, W].
        neuron: multi-step node; or ReLU for the ANN twin, which has one step and neither gate nor membrane.
        timesteps: T.
        gate: combines the spikes with the shortcut spikes.
        post_add: add the shortcut to the currents before the neuron instead.
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
        self.bn = bn
        self.neuron = neuron
        self.gate = gate
        self.timesteps = timesteps
        self.post_add = post_add
        self.implementation: Implementation = "lean"

    def forward(self, z: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Spikes [T, B, C, H, W] of z [T * B, C, H, W]; or of z [B, C, H, W] with `repeat_over_time`."""
        return self._forward(z, shortcut, repeat=False)

    def repeat_over_time(self, z: Tensor) -> Tensor:
        """Spikes [T, B, C, H, W] of a static z [B, C, H, W] that is the current at each of the T steps."""
        return self._forward(z, None, repeat=True)

    def _forward(self, z: Tensor, shortcut: Tensor | None, repeat: bool) -> Tensor:
        if isinstance(self.neuron, nn.ReLU):
            return self._analogue(z, shortcut)
        if self.implementation == "reference":
            return self._compose(z, shortcut, repeat, reference=True)
        if not self._lean_applies(z, self.neuron):
            return self._compose(z, shortcut, repeat, reference=False)
        assert isinstance(self.bn, nn.BatchNorm2d)
        fused_gate = self.gate.name if isinstance(self.gate, Gate) else None
        if self.bn.training and self.bn.num_batches_tracked is not None:
            self.bn.num_batches_tracked.add_(1)
        spec = _Spec(self.bn, self.neuron.dynamics(), fused_gate, self.post_add, self.timesteps, repeat)
        fused_shortcut = None if isinstance(self.gate, LearnedGate) else shortcut
        w = getattr(self.neuron, "w", None)
        spikes: Tensor = _UnitFunction.apply(z, self.bn.weight, self.bn.bias, fused_shortcut, w, spec)
        if isinstance(self.gate, LearnedGate):
            assert shortcut is not None
            spikes = self.gate(spikes, shortcut)
        return spikes

    def _analogue(self, z: Tensor, shortcut: Tensor | None) -> Tensor:
        x: Tensor = self.bn(z).unsqueeze(0)
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
        return plain_bn and not observed and not frozen and not node.keep_state and not node.store_v_seq

    def _compose(self, z: Tensor, shortcut: Tensor | None, repeat: bool, reference: bool) -> Tensor:
        assert not isinstance(self.neuron, nn.ReLU)
        x = self.bn(z.to(membrane_dtype(z.dtype)))
        T = self.timesteps
        x = x.unsqueeze(0).expand(T, *x.shape) if repeat else x.unflatten(0, (T, -1))
        if self.post_add:
            assert shortcut is not None
            x = x + shortcut
        spikes = self.neuron.reference_forward(x) if reference else self.neuron(x)
        spikes = spikes.to(z.dtype)
        if self.gate is None:
            return spikes
        assert shortcut is not None
        return self.gate.reference_forward(spikes, shortcut) if reference else self.gate(spikes, shortcut)


def use_implementation(model: nn.Module, implementation: Implementation) -> None:
    """Switch every spiking unit of a network between the lean and the reference form; weights stay where they are."""
    for module in model.modules():
        if isinstance(module, SpikingUnit):
            module.implementation = implementation


def _any_requires_grad(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class _Spec(NamedTuple):
    bn: nn.BatchNorm2d
    dynamics: Dynamics
    gate: str | None
    post_add: bool
    timesteps: int
    repeat: bool


class _UnitFunction(torch.autograd.Function):
    """(z, gamma, beta, shortcut, w) -> spikes. See the module docstring for what is saved."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, gamma: Tensor, beta: Tensor, shortcut: Tensor | None, w: Tensor | None, spec: _Spec
    ) -> Tensor:
        walk = _Walk(z, spec)
        bn = spec.bn
        normalise_tiles = walk.by_channel and bn.training
        mean, invstd = walk.empty_statistics() if normalise_tiles else _statistics(z, bn)
        q = None if w is None else w.to(walk.dtype).sigmoid()
        spikes = walk.empty_spikes()
        for part, channels in walk:
            tile = walk.tile(part)
            g, b = gamma[channels], beta[channels]
            if normalise_tiles:
                running = bn.running_mean[channels], bn.running_var[channels]
                x, mean[channels], invstd[channels] = aten.native_batch_norm(
                    tile, g, b, *running, True, bn.momentum, bn.eps
                )
            else:
                x = _affine(tile, g, b, mean[channels], invstd[channels])
            currents = walk.steps(x)
            if spec.post_add:
                currents = currents + shortcut[part]
            out = spikes[part]
            direct = out.dtype == walk.dtype
            h = out if direct and spec.gate is None else torch.empty_like(currents)
            forward_steps(spec.dynamics, q, currents.unbind(), h.unbind(), None)
            if spec.gate is not None:
                h = gate_forward(spec.gate, h, shortcut[part].to(walk.dtype), out if direct else h)
            if h is not out:
                out.copy_(h)
        saves_shortcut = spec.post_add or SAVES_SHORTCUT.get(spec.gate, False)
        ctx.save_for_backward(z, gamma, beta, mean, invstd, shortcut if saves_shortcut else None, w)
        ctx.spec = spec
        return spikes

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_spikes,) = grad_outputs
        z, gamma, beta, mean, invstd, shortcut, w = ctx.saved_tensors
        spec: _Spec = ctx.spec
        walk = _Walk(z, spec)
        q = None if w is None else w.to(walk.dtype).sigmoid()
        norm = _NormBackward(walk, gamma, mean, invstd, spec.bn.eps)
        grad_shortcut = torch.empty_like(shortcut) if shortcut is not None else None
        grad_w: Tensor | None = None
        for part, channels in walk:
            tile = walk.tile(part)
            h = walk.steps(_affine(tile, gamma[channels], beta[channels], mean[channels], invstd[channels]))
            if spec.repeat:
                h = h.contiguous()
            if spec.post_add:
                h.add_(shortcut[part])
            currents = h.clone() if q is not None else h
            charge_steps(spec.dynamics, q, h.unbind(), None)
            grad_s = grad_spikes[part].to(walk.dtype)
            if spec.gate is not None and grad_shortcut is not None:
                fired = torch.ge(h, spec.dynamics.v_threshold, out=torch.empty_like(h))
                other = shortcut[part].to(walk.dtype)
                grad_shortcut[part] = gate_backward_shortcut(spec.gate, grad_s, fired, torch.empty_like(h))
                grad_s = gate_backward_residual(spec.gate, grad_s, fired, other)
            _, grad_q = backward_steps(spec.dynamics, q, h.unbind(), grad_s.unbind(), currents=currents.unbind())
            if grad_q is not None:
                grad_w = grad_q if grad_w is None else grad_w + grad_q
            if spec.post_add:
                grad_shortcut[part] = h
            norm.add(part, channels, tile, h.sum(0) if spec.repeat else h.flatten(0, 1))
        grad_z, grad_gamma, grad_beta = norm.finish()
        if grad_w is not None and q is not None:
            grad_w = grad_w * q * (1 - q)
        if spec.gate == "add":
            grad_shortcut = grad_spikes
        return grad_z, grad_gamma, grad_beta, grad_shortcut, grad_w, None


class _Walk:
    """The tiles of one call: groups of channels, or of samples where memory is channels_last.

    A group of channels holds all a channel's statistics need, so that batch norm happens inside the tile.
    """

    def __init__(self, z: Tensor, spec: _Spec) -> None:
        self.z = z
        self.spec = spec
        channels_last = z.is_contiguous(memory_format=torch.channels_last) and not z.is_contiguous()
        self.by_channel = z.device.type != "cpu" or not channels_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.dtype = membrane_dtype(z.dtype)
        self.z_steps = 1 if spec.repeat else spec.timesteps
        self.z_seq = z.unflatten(0, (self.z_steps, -1))

    def __iter__(self) -> Iterator[tuple[tuple[slice, ...], slice]]:
        everything = slice(None)
        seq = self.z_seq.expand(self.spec.timesteps, *self.z_seq.shape[1:])
        for tile in tiles(seq, axis=2 if self.by_channel else 1):
            yield ((everything, everything, tile), tile) if self.by_channel else ((everything, tile), everything)

    def tile(self, part: tuple[slice, ...]) -> Tensor:
        """A dense copy of z's tile, [N, C, H, W] in the membrane's type."""
        piece = self.z_seq[part]
        tile = self.empty(piece.shape[0] * piece.shape[1], *piece.shape[2:], dtype=self.dtype)
        tile.unflatten(0, piece.shape[:2]).copy_(piece)
        return tile

    def steps(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [T, B, C, H, W]; a view."""
        return x.unflatten(0, (self.z_steps, -1)).expand(self.spec.timesteps, -1, -1, -1, -1)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.z.device, memory_format=self.memory_format)

    def empty_spikes(self) -> Tensor:
        T, (B, *rest) = self.spec.timesteps, self.z_seq.shape[1:]
        return self.empty(T * B, *rest, dtype=self.z.dtype).unflatten(0, (T, B))

    def empty_statistics(self) -> tuple[Tensor, Tensor]:
        return self.z.new_empty(self.z.shape[1], dtype=self.dtype), self.z.new_empty(self.z.shape[1], dtype=self.dtype)


def _statistics(z: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) a channel; of the batch (updating the running ones) or, in eval mode, running."""
    if bn.training:
        mean, var = torch.batch_norm_update_stats(z, bn.running_mean, bn.running_var, bn.momentum)
    else:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        mean, var = bn.running_mean, bn.running_var
    return mean, (var.double() + bn.eps).rsqrt().to(mean.dtype)


def _affine(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """Batch norm with known statistics, to the last bit as torch's training-mode kernel applies it."""
    scale = invstd * gamma
    return _scale_shift(x, scale, torch.addcmul(beta, mean, scale, value=-1.0))


def _scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    # Eval-mode batch norm with mean 0 and variance 1 is torch's fastest scale-and-shift by channel.
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return aten.native_batch_norm(x, scale, shift, zero, one, False, 0.0, 0.0)[0]


class _NormBackward:
    """Backward of batch norm from tiles of dL/dx: finished tile by tile by channels, in a second sweep by samples."""

    def __init__(self, walk: _Walk, gamma: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> None:
        self.walk, self.gamma, self.mean, self.invstd, self.eps = walk, gamma, mean, invstd, eps
        z = walk.z
        self.grad_z = torch.empty_like(z) if walk.by_channel else torch.empty_like(z, dtype=walk.dtype)
        self.grad_seq = self.grad_z.unflatten(0, (walk.z_steps, -1))
        self.grad_gamma, self.grad_beta = torch.zeros_like(gamma), torch.zeros_like(gamma)

    def add(self, part: tuple[slice, ...], channels: slice, tile: Tensor, grad_x: Tensor) -> None:
        """`tile` is z's; `grad_x` is dL/dx of the same shape."""
        if self.walk.by_channel:
            mean, invstd = self.mean[channels], self.invstd[channels]
            grad_tile, self.grad_gamma[channels], self.grad_beta[channels] = aten.native_batch_norm_backward(
                grad_x, tile, self.gamma[channels], None, None, mean, invstd, True, self.eps, [True, True, True]
            )
            self.grad_seq[part] = grad_tile.unflatten(0, (self.walk.z_steps, -1))
            return
        self.grad_seq[part] = grad_x.unflatten(0, (self.walk.z_steps, -1))
        self.grad_beta += grad_x.sum((0, 2, 3))
        self.grad_gamma += tile.sub_(self.mean[:, None, None]).mul_(grad_x).sum((0, 2, 3))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dL/dz, dL/dgamma, dL/dbeta)."""
        if self.walk.by_channel:
            return self.grad_z, self.grad_gamma, self.grad_beta
        z = self.walk.z
        count = z.numel() // z.shape[1]
        scale = self.gamma * self.invstd
        of_z = -scale * self.invstd.square() * self.grad_gamma / count
        shift = -scale * self.grad_beta / count - of_z * self.mean
        grad_z = self.grad_seq if z.dtype == self.walk.dtype else torch.empty_like(z).unflatten(0, (self.walk.z_steps, -1))
        for part, _ in self.walk:
            centred = _scale_shift(self.walk.tile(part), of_z, shift).unflatten(0, (self.walk.z_steps, -1))
            grad_z[part] = centred.addcmul_(self.grad_seq[part], scale[:, None, None])
        return grad_z.flatten(0, 1), self.grad_gamma * self.invstd, self.grad_beta
