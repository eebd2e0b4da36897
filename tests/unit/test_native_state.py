"""I-LIF by itself, and membranes carried from window to window, in the native form on the CPU equal the reference."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.unit_checks import FORMS, LAYOUTS, build_unit
from spikefleet_models import kernels
from spikefleet_models.carried_state import with_state
from spikefleet_models.families import build_model, model_config
from spikefleet_models.kernels import native_integers, native_unit
from spikefleet_models.neurons import ILIF
from spikefleet_models.spiking_unit import SpikingUnit, use_implementation

B, C, H, W = 2, 33, 5, 4
UNITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft, kept gradient": {"kind": "lif", "v_reset": None, "detach_reset": False, "gate": "bsg"},
    "rest below zero": {"kind": "lif", "tau": 3.0, "v_reset": -0.1, "post_add": True},
    "plif": FORMS["plif"],
    "ilif": {"kind": "ilif", "bound": 4, "leak": 0.3, "input_scale": 0.7, "gate": "add"},
}


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the native functions that ran; each test must run one."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    assert kernels.native_flaw() is None
    calls: list[str] = []
    for module in (native_unit, native_integers):
        apply = module.apply

        def counted(*arguments: Any, apply: Any = apply, name: str = module.__name__) -> Any:
            calls.append(name.rpartition("_")[2])
            return apply(*arguments)

        monkeypatch.setattr(module, "apply", counted)
    yield calls
    assert calls, "the native form did not run"


def currents(shape: tuple[int, ...], layout: str = "nchw", bound: int = 4) -> tuple[Tensor, Tensor]:
    """[T, ...] currents of which many are at a tie or an end of [0, D], and weights of the loss."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * bound + 0.4 * bound
    x = torch.where(x.abs() % 1 < 0.3, (x * 2).round() / 2, x)
    weights = torch.randn(shape, generator=generator)
    if layout == "nhwc":
        x = x.flatten(0, 1).contiguous(memory_format=LAYOUTS[layout]).unflatten(0, shape[:2])
    return x, weights


def run(node: ILIF, form: str, x: Tensor, weights: Tensor, carried: bool) -> dict[str, Tensor]:
    """Integers, membrane and gradients of one window, or of two with the state carried."""
    node = copy.deepcopy(node)
    node.implementation = form  # type: ignore[assignment]
    node.keep_state = carried
    leaf = x.clone().requires_grad_()
    emitted = node(leaf)
    if carried:
        emitted = emitted + 2 * node(leaf)
    loss = (emitted * weights).sum()
    if carried:
        loss = loss + (node.v * weights[0]).sum()
    loss.backward()
    assert leaf.grad is not None
    found = {"emitted": emitted.detach(), "grad": leaf.grad}
    return found | ({"membrane": node.v.detach()} if carried else {})


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 3e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if name.startswith("grad"):
            scale = expected.abs().max().clamp_min(1e-3) * (4 if name.endswith(".w") else 1)
            assert (ours[name].float() - expected.float()).abs().max() <= tolerance * scale, name
        else:
            assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    ("shape", "constants"),
    [
        ((3, 2, 33, 5, 4), {}),
        ((1, 2, 8, 24, 24), {"bound": 1}),
        ((2, 1, 3, 7, 3), {"bound": 255, "leak": 0.0}),
        ((2, 2, 5, 1, 1), {"leak": 1.0, "input_scale": 0.3}),
    ],
)
def test_integers_equal_the_step_equations(
    shape: tuple[int, ...], constants: dict[str, Any], layout: str, carried: bool
) -> None:
    node = ILIF(**({"leak": 0.3, "input_scale": 0.7} | constants))
    x, weights = currents(shape, layout, node.bound)
    ours, theirs = (run(node, form, x, weights, carried) for form in ("native", "lean"))
    assert_equal(ours, theirs)
    assert ours["emitted"].flatten(0, 1).is_contiguous(memory_format=LAYOUTS[layout])
    half = {form: run(node, form, x.bfloat16(), weights.bfloat16(), carried) for form in ("native", "lean")}
    assert half["native"]["emitted"].dtype == half["native"]["grad"].dtype == torch.bfloat16
    assert_equal(half["native"], half["lean"], tolerance=2**-7)


def test_the_comparison_notices_another_leak() -> None:
    x, weights = currents((3, 2, 33, 5, 4))
    ours, theirs = (run(ILIF(4, leak), "native", x, weights, True) for leak in (0.25, 0.26))
    with pytest.raises(AssertionError, match="emitted"):
        assert_equal(ours, theirs)
    with pytest.raises(AssertionError, match="grad"):
        assert_equal({"grad": ours["grad"]}, {"grad": theirs["grad"]})


def test_ties_ends_and_nan() -> None:
    u = [-0.2, -0.0, 0.49, 0.5, 0.51, 1.5, 2.5, 3.5, 4.0, 4.2, float("inf"), float("-inf"), float("nan")]
    x = torch.tensor([u], requires_grad=True)
    node = ILIF(4)
    node.implementation = "native"
    emitted = node(x)
    emitted.sum().backward()
    assert emitted[0, :-1].tolist() == [0, 0, 0, 0, 1, 2, 2, 4, 4, 4, 4, 0]
    assert emitted[0, -1].isnan()
    assert x.grad is not None
    assert x.grad[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_saves_one_bit_an_element() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    node = ILIF(4)
    node.implementation = "native"
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        node(torch.randn(3, 2, 50, requires_grad=True))
    assert [(tensor.dtype, tensor.shape) for tensor in saved] == [(torch.uint8, (3, 13))]


def test_currents_that_the_kernels_cannot_read_have_a_reason(native: list[str]) -> None:
    x, _ = currents((3, 2, 33, 5, 4))
    for other, v, reason in (
        (x.double(), None, "float64"),
        (x.transpose(0, 1), None, "strides"),
        (x[:1].expand_as(x), None, "strides"),
        (x[:, :, :, :, :2], None, "strides"),
        (x[:0], None, "shape"),
        (x, torch.zeros(2, 33, 5, 3), "the membrane"),
        (x, torch.zeros(2, 33, 5, 4, dtype=torch.float64), "the membrane"),
        (x.to("meta"), None, "meta"),
    ):
        assert reason in (native_integers.problem(other, v) or "")
    node = ILIF(4)
    expected = node(x.transpose(0, 1))
    node.implementation = "native"
    assert torch.equal(node(x.transpose(0, 1)), expected)
    assert native == []
    node(x)


def windows(unit: SpikingUnit, z: Tensor, shortcut: Tensor | None, weights: Tensor, form: str) -> dict[str, Tensor]:
    """Two windows with the state carried, and the gradients through both."""
    unit = copy.deepcopy(unit)
    use_implementation(unit, form)  # type: ignore[arg-type]
    leaf = z.clone().requires_grad_()
    joined = None if shortcut is None else shortcut.clone().requires_grad_()
    unit.neuron.keep_state = True  # type: ignore[assignment]
    loss = torch.zeros(())
    found = {}
    for number, factor in enumerate((1.0, 0.7)):
        spikes = unit(leaf * factor, joined)
        loss = loss + (spikes * weights).sum()
        found[f"spikes {number}"] = spikes.detach().float()
    membrane = unit.neuron.v
    assert isinstance(membrane, Tensor)
    (loss + (membrane * weights[0]).sum()).backward()
    found |= {"membrane": membrane.detach(), "grad z": leaf.grad}
    if joined is not None:
        found["grad shortcut"] = joined.grad
    found |= {f"grad {name}": parameter.grad for name, parameter in unit.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in unit.named_buffers()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("form", list(UNITS))
def test_a_carried_membrane_equals_the_reference(form: str, layout: str, native: list[str]) -> None:
    unit = build_unit(3, C, **UNITS[form])
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(3 * B, C, H, W, generator=generator) * 2 + 1).contiguous(memory_format=LAYOUTS[layout])
    takes_shortcut = unit.gate is not None or unit.post_add
    shortcut = (torch.rand(3, B, C, H, W, generator=generator) < 0.4).float() if takes_shortcut else None
    weights = torch.randn(3, B, C, H, W, generator=generator)
    ours, theirs = (windows(unit, z, shortcut, weights, name) for name in ("native", "reference"))
    assert_equal(ours, theirs)
    assert native == ["unit"] * 2
    unit.neuron.v = torch.ones(B, C, H, W)
    other = windows(unit, z, shortcut, weights, "native")
    assert not torch.equal(other["spikes 0"], ours["spikes 0"])


def test_a_detector_trains_as_in_the_lean_form(native: list[str]) -> None:
    torch.manual_seed(0)
    network = build_model(model_config("spike_yolo_tiny", num_classes=3, timesteps=2))
    lean = copy.deepcopy(network)
    use_implementation(network, "native")
    use_implementation(lean, "lean")
    images = torch.rand(2, 3, 64, 64)
    outputs = [model(images) for model in (network, lean)]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    for levels in outputs:
        sum(level.square().mean() for level in levels).backward()
    assert len(native) > 20
    assert set(native) == {"integers"}
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), lean.buffers(), strict=True))
    # Before a batch norm a bias, or another batch norm, has a gradient of rounding errors alone.
    floor = 3e-6 * max(p.grad.abs().max() for p in lean.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(network.named_parameters(), lean.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() <= max(1e-5 * theirs.grad.abs().max(), floor), name


def test_a_network_reads_windows_as_in_the_reference(native: list[str]) -> None:
    torch.manual_seed(0)
    network = build_model(model_config("spike_yolo_tiny", num_classes=3, timesteps=2)).eval()
    frames = torch.rand(4, 1, 3, 64, 64)
    found = {}
    for form in ("native", "lean"):
        use_implementation(network, form)  # type: ignore[arg-type]
        with torch.no_grad():
            _, state = with_state(network, frames[:2])
            found[form], _ = with_state(network, frames[2:], state)
    assert all(torch.equal(a, b) for a, b in zip(found["native"], found["lean"], strict=True))
