"""Compares the native form with the lean form on small tensors, once in a process, before the native form is used.

A torch that rounds otherwise, a processor without fused multiply-add and a compiler with a fault all show here.
"""

import copy
import threading
from collections.abc import Iterator

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from spikefleet_models.gates import GateName
from spikefleet_models.kernels import native_unit
from spikefleet_models.membrane import Dynamics
from spikefleet_models.unit_spec import UnitSpec

_SHAPE = (6, 20, 5, 4)
"""Of z: T * B, C, H, W; more than one vector of numbers, and a rest."""
_T = 3
_GRADIENT = 3e-6
_GRADIENT_BF16 = 2**-7
"""Each of the two rounds to bf16."""
_CASES: tuple[tuple[GateName | None, float | None, float | None, tuple[torch.dtype, ...]], ...] = (
    ("bsg", None, 0.0, (torch.float32, torch.bfloat16)),
    (None, 3.0, None, (torch.float32,)),
    ("add", 3.0, -0.1, (torch.float32,)),
)
"""Gate, tau, v_reset, types."""


def difference_from_lean() -> str | None:
    """What the native form computes otherwise than the lean form; None where they agree."""
    found: list[str] = []

    def compare_all() -> None:
        try:
            found.extend(_differences())
        except Exception as error:
            found.append(f"the check failed: {error!r}")

    # Gradient mode, autocast, hooks and dispatch modes of the caller belong to its thread.
    thread = threading.Thread(target=compare_all, name="native spiking unit: check")
    thread.start()
    thread.join()
    return found[0] if found else None


def _differences() -> Iterator[str]:
    for layout in (torch.contiguous_format, torch.channels_last):
        for gate, tau, v_reset, types in _CASES:
            for dtype in types:
                name = f"{gate or 'no gate'}, tau {tau}, {str(dtype).removeprefix('torch.')}"
                flaw = _difference(gate, tau, v_reset, dtype, layout)
                if flaw is not None:
                    yield f"differs from lean: {flaw} ({name}, {'NHWC' if layout == torch.channels_last else 'NCHW'})"


def _difference(
    gate: str | None, tau: float | None, v_reset: float | None, dtype: torch.dtype, layout: torch.memory_format
) -> str | None:
    from spikefleet_models.spiking_unit import lean_unit

    dynamics = Dynamics(0.5, v_reset, False, True, tau, surrogate.ATan())
    bn = nn.BatchNorm2d(_SHAPE[1], device="cpu", dtype=torch.float32)
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    for compute in (native_unit.apply, lean_unit):
        spec = UnitSpec(copy.deepcopy(bn), dynamics, gate, "exact", False, _T, False)
        z, shortcut, weights = (
            tensor.to(dtype).contiguous(memory_format=layout).requires_grad_(index < 2)
            for index, tensor in enumerate(_tensors())
        )
        joined = None if gate is None else shortcut.unflatten(0, (_T, -1))
        if (flaw := native_unit.problem(z, joined, spec)) is not None:
            return flaw
        spikes = compute(z, spec.bn.weight, spec.bn.bias, joined, None, spec)
        (spikes * weights.unflatten(0, (_T, -1))).sum().backward()
        gradients = (z.grad, spec.bn.weight.grad, spec.bn.bias.grad, shortcut.grad)
        exact = (spikes.detach(), spec.bn.running_mean, spec.bn.running_var)
        found.append(([t for t in exact if t is not None], [t for t in gradients if t is not None]))
    (ours, our_gradients), (theirs, their_gradients) = found
    for what, mine, other in zip(("spikes", "running mean", "running variance"), ours, theirs, strict=True):
        if not torch.equal(mine, other):
            return f"{what}: {int(mine.ne(other).sum())} of {mine.numel()}"
    tolerance = _GRADIENT if dtype == torch.float32 else _GRADIENT_BF16
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        if not _close(mine, other, tolerance):
            return f"gradients by {float((mine.float() - other.float()).abs().max()):.2g}"
    return None


def _close(mine: Tensor, other: Tensor, tolerance: float) -> bool:
    # Tensors that are not equal and hold a number that is not finite are not close.
    return bool((mine.float() - other.float()).abs().max() <= tolerance * other.float().abs().max())


def _tensors() -> tuple[Tensor, Tensor, Tensor]:
    """z, spikes for the gate, and weights of the loss."""
    generator = torch.Generator("cpu").manual_seed(0)
    z, shortcut, weights = torch.randn((3, *_SHAPE), generator=generator, dtype=torch.float32).unbind()
    return z * 2 + 1, (shortcut > 0).float(), weights
