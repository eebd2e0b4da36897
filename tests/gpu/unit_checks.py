"""The forms of the spiking unit on a device against the reference: spikes, statistics, gradients, repeatability.

Each case runs in a process of its own pool, so that Triton compiles on all cores. Run as a script with a JSON list of
cases on standard input, it prints one JSON line for each.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from spikefleet_models.gates import build_gate
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron
from spikefleet_models.spiking_unit import SpikingUnit, use_implementation

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bsg": {"gate": "bsg"},
    "bsg exact": {"gate": "bsg", "gradient": "exact"},
    "bsg_star": {"gate": "bsg_star"},
    "bsg_star exact": {"gate": "bsg_star", "gradient": "exact"},
    "add": {"gate": "add"},
    "and": {"gate": "and"},
    "iand": {"gate": "iand"},
    "post_add": {"post_add": True},
    "lif": {"kind": "lif", "v_reset": -0.1, "gate": "bsg"},
    "lif tau 3": {"kind": "lif", "tau": 3.0, "v_threshold": 0.5},
    "lif tau 3 soft, free input": {
        "kind": "lif",
        "tau": 3.0,
        "v_reset": None,
        "decay_input": False,
        "v_threshold": 0.3,
    },
    "lif soft": {"kind": "lif", "v_reset": None, "detach_reset": False},
    "plif": {"kind": "plif", "gate": "bsg", "detach_reset": False},
    "plif free input": {"kind": "plif", "decay_input": False},
    **{name: {"surrogate": name} for name in ("rect", "piecewise_quadratic", "sigmoid", "erf", "dspike", "soft_sign")},
}
SIZES = {
    "small": (4, 4, 32, 8, 8),
    "odd": (3, 5, 33, 7, 9),
    "large": (4, 16, 64, 32, 32),
    "six steps": (6, 4, 16, 8, 8),
}
"""T, B, C, H, W."""
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALARS = ("spikes differ", "spikes", "mean_equal", "var_equal")


class Case(NamedTuple):
    """One comparison."""

    form: str
    layout: str
    size: str
    dtype: str
    repeat: bool = False


def all_cases() -> list[Case]:
    """Every form in both layouts in fp32; fewer at odd and large sizes, with static input, and in 16 bits."""
    cases = [Case(form, layout, "small", "fp32") for form in FORMS for layout in LAYOUTS]
    for layout in LAYOUTS:
        some = ("plain", "bsg exact", "post_add", "plif", "lif tau 3")
        cases += [Case(form, layout, "odd", "fp32") for form in some]
        cases += [Case(form, layout, "large", kind) for form in some for kind in ("fp32", "bf16")]
        cases += [Case(form, layout, "six steps", "fp16") for form in ("plain", "bsg exact")]
        cases += [Case(form, layout, "odd", "fp32", repeat=True) for form in ("plain", "plif free input")]
        cases += [
            Case("plain", layout, "small", "fp32", repeat=True),
            Case("plain", layout, "large", "bf16", repeat=True),
        ]
        cases += [Case("add", layout, "large", "bf16")]
    return cases


def build_unit(timesteps: int, channels: int, gate: str | None = None, post_add: bool = False,
               gradient: str = "literal", **neuron: Any) -> SpikingUnit:  # fmt: skip
    """A unit with drawn scales, whose neurons fire."""
    torch.manual_seed(1)
    bn = nn.BatchNorm2d(channels)
    nn.init.uniform_(bn.weight, 0.5, 2.0)
    nn.init.normal_(bn.bias)
    module = None if gate is None else build_gate(gate, channels, 0.5, surrogate.ATan(), gradient)  # type: ignore[arg-type]
    return SpikingUnit(bn, build_neuron(NeuronConfig(**neuron)), timesteps, module, post_add)


def outputs(unit: SpikingUnit, z: Tensor, x: Tensor | None, weights: Tensor, repeat: bool) -> dict[str, Tensor]:
    """Spikes, all gradients and all buffers of one forward and backward pass."""
    z = z.clone().requires_grad_()
    shortcut = None if x is None else x.clone().requires_grad_()
    unit.zero_grad()
    steps = (unit.timesteps, -1)
    y = unit.repeat_over_time(z) if repeat else unit(z, None if shortcut is None else shortcut.unflatten(0, steps))
    (y * weights.unflatten(0, steps)).sum().backward()
    found = {"spikes": y.detach(), "grad z": z.grad}
    if shortcut is not None:
        found["grad shortcut"] = shortcut.grad
    found |= {f"grad {name}": parameter.grad for name, parameter in unit.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in unit.named_buffers()}
    return {name: value for name, value in found.items() if value is not None}


def check(case: Case, device: torch.device, fused: str) -> dict[str, Any]:
    """Compare lean and the fused form with the reference; an empty "problems" is a pass."""
    T, B, C, H, W = SIZES[case.size]
    options = FORMS[case.form]
    layout, dtype = LAYOUTS[case.layout], TYPES[case.dtype]
    generator = torch.Generator().manual_seed(2)
    frames = B if case.repeat else T * B
    z = (torch.randn(frames, C, H, W, generator=generator) * 2 + 1).to(dtype)
    x = (torch.rand(T * B, C, H, W, generator=generator) < 0.4).to(dtype)
    weights = torch.randn(T * B, C, H, W, generator=generator).to(dtype)
    z, x, weights = (tensor.to(device).contiguous(memory_format=layout) for tensor in (z, x, weights))
    takes_shortcut = "gate" in options or options.get("post_add")
    shortcut = x if takes_shortcut and not case.repeat else None
    reference = build_unit(T, C, **options).to(device)
    wide = None if shortcut is None else shortcut.float()
    forms = {name: copy.deepcopy(reference) for name in ("lean", fused, "again")}
    use_implementation(reference, "reference")
    expected = outputs(reference, z.float(), wide, weights.float(), case.repeat)
    found: dict[str, Any] = {"case": case._asdict(), "rate": float(expected["spikes"].mean()), "problems": []}
    values = {}
    for name, unit in forms.items():
        use_implementation(unit, "lean" if name == "lean" else fused)  # type: ignore[arg-type]
        values[name] = outputs(unit, z, shortcut, weights, case.repeat)
        if name != "again":
            found[name] = _difference(values[name], expected, case.dtype == "fp32", found["problems"], name)
    unequal = [key for key, value in values[fused].items() if not torch.equal(value, values["again"][key])]
    if unequal:
        found["problems"].append(f"{fused}: not the same bits twice: {unequal}")
    return found


def _difference(
    ours: dict[str, Tensor], expected: dict[str, Tensor], exact: bool, problems: list[str], form: str
) -> dict[str, float]:
    flips = int((ours["spikes"].float() != expected["spikes"].float()).sum())
    errors = {}
    for name, value in expected.items():
        if name.startswith("grad"):
            scale = value.abs().max().clamp_min(1e-3)
            errors[name] = float((ours[name].float() - value).abs().max() / scale)
    unequal = [name for name in ("bn.running_mean", "bn.running_var") if not torch.equal(ours[name], expected[name])]
    bar = (1e-5 if expected["grad z"].numel() > 1 << 20 else 3e-6) if exact else 2**-8
    if flips:
        problems.append(f"{form}: {flips} spikes differ")
    if unequal:
        problems.append(f"{form}: {unequal} differ")
    problems += [f"{form}: {name} differs by {error:.2e}" for name, error in errors.items() if error > bar]
    return {"flips": flips, "worst": max(errors.values())}


def rounding(device: torch.device) -> dict[str, Any]:
    """Which formula torch's native batch norm rounds like, and whether its statistics are those of the update alone."""
    found: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        torch.manual_seed(3)
        z = (torch.randn(64, 32, 16, 16, device=device) * 2 + 1).contiguous(memory_format=layout)
        gamma, beta = torch.rand(32, device=device) + 0.5, torch.randn(32, device=device)
        running = [torch.zeros(32, device=device), torch.ones(32, device=device)]
        again = [value.clone() for value in running]
        out, mean, invstd = torch.ops.aten.native_batch_norm(z, gamma, beta, *running, True, 0.1, 1e-5)
        ours, variance = torch.ops.aten.batch_norm_update_stats(z, *again, 0.1)
        row: dict[str, Any] = {
            "mean": torch.equal(mean, ours),
            "invstd": torch.equal(invstd, torch.rsqrt(variance + 1e-5)),
            "running": all(torch.equal(a, b) for a, b in zip(running, again, strict=True)),
        }
        if device.type == "cuda":
            row["elemt"] = torch.equal(out, torch.batch_norm_elemt(z, gamma, beta, mean, invstd, 0.0))
        m, i, g, b = (value[:, None, None] for value in (mean, invstd, gamma, beta))
        formulas = {
            "fma(g*(z-m), i, b)": ((g * (z - m)).double() * i.double() + b.double()).float(),
            "fma((z-m)*i, g, b)": (((z - m) * i).double() * g.double() + b.double()).float(),
            "fma(z-m, i*g, b)": ((z - m).double() * (i * g).double() + b.double()).float(),
            "(z-m)*i*g+b": (z - m) * i * g + b,
            "g*(z-m)*i+b": g * (z - m) * i + b,
        }
        row["unequal"] = {formula: int((out != value).sum()) for formula, value in formulas.items()}
        found[name] = row
    return found


def main() -> None:
    """Check the cases of standard input."""
    request = json.load(sys.stdin)
    device = torch.device(request["device"])
    for values in request["cases"]:
        case = Case(**values)
        try:
            found = check(case, device, request["fused"])
        except Exception:
            found = {"case": values, "problems": [traceback.format_exc()[-1500:]]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
