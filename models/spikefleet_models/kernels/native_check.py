"""Compares the native form with the lean form on small tensors, once in a process, before the native form is used.

A torch that rounds otherwise, a processor without fused multiply-add and a compiler with a fault all show here.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from spikefleet_models.gates import GateName
from spikefleet_models.kernels import native_integers, native_unit
from spikefleet_models.membrane import Dynamics, IntegerDynamics
from spikefleet_models.neurons import lean_integers
from spikefleet_models.spiking_unit import lean_unit
from spikefleet_models.unit_spec import UnitSpec

_T = 3
_CHANNELS, _SIDES = 20, (5, 4)
"""Of z: more than one vector of numbers, and a rest."""
_GRADIENT = 3e-6
_GRADIENT_BF16 = 2**-7
"""Each of the two rounds to bf16."""


class _Case(NamedTuple):
    gate: GateName | None
    dynamics: Dynamics | IntegerDynamics
    types: tuple[torch.dtype, ...] = (torch.float32,)
    carried: bool = False
    """Whether the membrane starts from a state, and returns one."""


_CASES = (
    _Case("bsg", Dynamics(0.5, 0.0, False, True, None, surrogate.ATan()), (torch.float32, torch.bfloat16)),
    _Case(None, Dynamics(0.5, None, False, True, 3.0, surrogate.ATan())),
    _Case("add", Dynamics(0.5, -0.1, False, True, 3.0, surrogate.Sigmoid()), carried=True),
    _Case("add", IntegerDynamics(4, 0.3, 0.7), (torch.float32, torch.bfloat16), carried=True),
)


def difference_from_lean() -> str | None:
    """What the native form computes otherwise than the lean form; None where they agree."""
    found: str | None = "the check did not finish"

    def compare_all() -> None:
        nonlocal found
        try:
            found = next(_differences(), None)
        except Exception as error:
            found = f"the check failed: {error!r}"

    # Gradient mode, autocast, hooks and dispatch modes of the caller belong to its thread.
    thread = threading.Thread(target=compare_all, name="native spiking unit: check")
    try:
        thread.start()
    except RuntimeError as error:
        return f"the check failed: {error}"
    thread.join()
    return found


def _shape() -> tuple[int, int, int, int]:
    """Of z, T * B, C, H, W: a channel has more elements than torch has threads, which the native form needs."""
    height, width = _SIDES
    batch = max(2, torch.get_num_threads() // (_T * height * width) + 1)
    return _T * batch, _CHANNELS, height, width


def _differences() -> Iterator[str]:
    for layout in (torch.contiguous_format, torch.channels_last):
        for case in _CASES:
            for dtype in case.types:
                neuron = "I-LIF" if isinstance(case.dynamics, IntegerDynamics) else f"tau {case.dynamics.tau}"
                name = f"{case.gate or 'no gate'}, {neuron}, {str(dtype).removeprefix('torch.')}"
                flaw = _difference(case, dtype, layout)
                if flaw is not None:
                    yield f"differs from lean: {flaw} ({name}, {'NHWC' if layout == torch.channels_last else 'NCHW'})"


def _difference(case: _Case, dtype: torch.dtype, layout: torch.memory_format) -> str | None:
    bn = nn.BatchNorm2d(_CHANNELS, device="cpu", dtype=torch.float32)
    found: list[tuple[dict[str, Tensor], list[Tensor]]] = []
    integers = isinstance(case.dynamics, IntegerDynamics)
    forms: list[Callable[..., Any]] = [native_unit.apply]
    forms += [_norm_then_native, _norm_then_lean] if integers else [lean_unit]
    for compute in forms:
        spec = UnitSpec(copy.deepcopy(bn), case.dynamics, case.gate, "exact", False, _T, False)
        z, shortcut, weights = (
            tensor.to(dtype).contiguous(memory_format=layout).requires_grad_(index < 2)
            for index, tensor in enumerate(_tensors())
        )
        joined = None if case.gate is None else shortcut.unflatten(0, (_T, -1))
        v_init = weights[: len(weights) // _T].float().requires_grad_()
        if (flaw := native_unit.problem(z, joined, spec, v_init)) is not None:
            return flaw
        arguments = (z, spec.bn.weight, spec.bn.bias, joined, None, spec)
        spikes, v_last = compute(*arguments, v_init) if case.carried else (compute(*arguments), v_init)
        ((spikes * weights.unflatten(0, (_T, -1))).sum() + (v_last * v_init.detach()).sum()).backward()
        gradients = (z.grad, spec.bn.weight.grad, spec.bn.bias.grad, shortcut.grad, v_init.grad)
        exact = {"spikes": spikes, "membrane": v_last, "running mean": spec.bn.running_mean}
        exact["running variance"] = spec.bn.running_var
        found.append(({k: v for k, v in exact.items() if v is not None}, [g for g in gradients if g is not None]))
    tolerance = _GRADIENT if dtype == torch.float32 else _GRADIENT_BF16
    *all_ours, (theirs, their_gradients) = found
    for ours, our_gradients in all_ours:
        for what, other in theirs.items():
            if not torch.equal(ours[what], other):
                return f"{what}: {int(ours[what].ne(other).sum())} of {other.numel()}"
        for mine, other in zip(our_gradients, their_gradients, strict=True):
            if not _close(mine, other, tolerance):
                return f"gradients by {float((mine.float() - other.float()).abs().max()):.2g}"
    return None


def _norm_then_native(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    return _norm_then(native_integers.apply, *arguments)


def _norm_then_lean(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    return _norm_then(lean_integers, *arguments)


def _norm_then(
    integers: Callable[..., tuple[Tensor, Tensor | None]],
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shortcut: Tensor,
    w: None,
    spec: UnitSpec,
    v_init: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The unit as torch's batch norm, I-LIF by itself, and the gate ADD."""
    emitted, v_last = integers(spec.sequence(spec.bn(z.float())), v_init, spec.dynamics)
    return emitted.to(z.dtype) + shortcut, v_last


def _close(mine: Tensor, other: Tensor, tolerance: float) -> bool:
    # Tensors that are not equal and hold a number that is not finite are not close.
    return bool((mine.float() - other.float()).abs().max() <= tolerance * other.float().abs().max())


def _tensors() -> tuple[Tensor, Tensor, Tensor]:
    """z, spikes for the gate, and weights of the loss."""
    generator = torch.Generator("cpu").manual_seed(0)
    z, shortcut, weights = torch.randn((3, *_shape()), generator=generator, dtype=torch.float32).unbind()
    return z * 2 + 1, (shortcut > 0).float(), weights
