"""The spiking unit in C++ on the CPU equals the reference; where it cannot be used, the lean form runs and says so."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from gpu.unit_checks import FORMS, LAYOUTS, build_unit, outputs
from spikefleet_models import kernels
from spikefleet_models.families import build_model, model_config
from spikefleet_models.kernels import native_check, native_library, native_unit
from spikefleet_models.spiking_unit import SpikingUnit, use_implementation
from spikefleet_models.unit_spec import UnitSpec
from support.cpu_forms import COMPILER, needs_compiler

T, B, SIDES = 3, 2, (5, 4)
ILIF = {"kind": "ilif", "bound": 4, "leak": 0.3, "input_scale": 0.7}
NATIVE: dict[str, dict[str, Any]] = {
    **FORMS,
    "piecewise_exp": {"surrogate": "piecewise_exp", "v_reset": None},
    "super_spike": {"surrogate": "super_spike"},
    "ilif": ILIF,
    "ilif add": {**ILIF, "gate": "add"},
    "ilif post_add": {**ILIF, "post_add": True},
    "ilif binary bsg exact": {**ILIF, "bound": 1, "gate": "bsg", "gradient": "exact"},
    "ilif binary iand": {**ILIF, "bound": 1, "gate": "iand"},
}


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[UnitSpec]]:
    """The calls of the native form, which the test must have made."""
    if not COMPILER:
        pytest.skip("no C++ compiler")
    assert kernels.native_flaw() is None
    calls: list[UnitSpec] = []
    apply = native_unit.apply

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments[-1])
        return apply(*arguments)

    monkeypatch.setattr(native_unit, "apply", counted)
    yield calls
    assert calls, "the native form did not run"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors(
    layout: str, dtype: torch.dtype = torch.float32, channels: int = 33, sides: tuple[int, int] = SIDES, frames: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """z, spikes of a shortcut, and weights of the loss."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(frames or T * B, channels, *sides, generator=generator) * 2 + 1
    x = (torch.rand(T * B, channels, *sides, generator=generator) < 0.4).float()
    weights = torch.randn(T * B, channels, *sides, generator=generator)
    z, x, weights = (tensor.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for tensor in (z, x, weights))
    return z, x, weights


def both(
    form: str,
    layout: str,
    dtype: torch.dtype = torch.float32,
    repeat: bool = False,
    change: str = "",
    **shape: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the native form and the reference form in fp32 compute in two steps; `change` makes another reference."""
    z, x, weights = tensors(layout, dtype, frames=B if repeat else 0, **shape)
    unit = build_unit(T, z.shape[1], **NATIVE[form])
    reference = copy.deepcopy(unit)
    use_implementation(unit, "native")
    use_implementation(reference, "reference")
    if change == "gate gradient":
        reference.gate.gradient = "literal"
    elif change == "momentum":
        reference.bn.momentum = 0.2  # type: ignore[assignment]
    elif change == "threshold":
        reference.neuron.v_threshold = 1.05  # type: ignore[assignment]
    elif change == "leak":
        reference.neuron.leak = 0.31  # type: ignore[assignment]
    shortcut = x if unit.gate is not None or unit.post_add else None
    wide = None if shortcut is None else shortcut.float()
    for _ in range(2):  # the second starts from other running statistics
        ours = outputs(unit, z, shortcut, weights, repeat)
        theirs = outputs(reference, z.float(), wide, weights.float(), repeat)
    return ours, theirs


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 3e-6) -> None:
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["spikes"].float(), theirs["spikes"])
    for name, expected in theirs.items():
        if name.startswith("grad"):
            scale = expected.abs().max().clamp_min(1e-3)
            if name.endswith("neuron.w"):  # one number: terms of both signs, which the reference adds in fp32
                scale = scale * 4
            assert (ours[name].float() - expected).abs().max() <= tolerance * scale, name
        else:
            assert name == "spikes" or torch.equal(ours[name], expected), name


@needs_compiler
def test_where_there_is_a_compiler_the_native_form_can_be_used() -> None:
    assert kernels.native_flaw() is None


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("form", NATIVE)
def test_native_equals_the_reference(form: str, layout: str, native: list[UnitSpec]) -> None:
    ours, theirs = both(form, layout)
    assert 0.02 < theirs["spikes"].mean() < 2.5
    assert_same(ours, theirs)
    assert len(native) == 2


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    ("channels", "sides"), [(3, (24, 24)), (5, (23, 25)), (600, (2, 1)), (17, (1, 1)), (64, (8, 8)), (1, (7, 3))]
)
def test_planes_and_channels_of_any_size(
    channels: int, sides: tuple[int, int], layout: str, native: list[UnitSpec]
) -> None:
    assert_same(*both("bsg exact", layout, channels=channels, sides=sides))


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("form", ["plain", "plif free input", "ilif"])
def test_static_input_is_normalised_once(form: str, layout: str, native: list[UnitSpec]) -> None:
    assert_same(*both(form, layout, repeat=True))


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("form", ["plain", "bsg exact", "add", "post_add", "plif", "sigmoid", "ilif add"])
def test_bf16_keeps_fp32_inside(form: str, layout: str, native: list[UnitSpec]) -> None:
    ours, theirs = both(form, layout, torch.bfloat16)
    assert ours["spikes"].dtype == ours["grad z"].dtype == torch.bfloat16
    assert ours["spikes"].flatten(0, 1).is_contiguous(memory_format=LAYOUTS[layout])
    assert_same(ours, theirs, tolerance=2**-8)


@pytest.mark.parametrize(
    ("form", "change"),
    [("bsg exact", "gate gradient"), ("plain", "momentum"), ("lif", "threshold"), ("ilif add", "leak")],
)
def test_the_comparison_notices_another_unit(form: str, change: str, native: list[UnitSpec]) -> None:
    with pytest.raises(AssertionError):
        assert_same(*both(form, "nchw", change=change))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_spikes_equal_the_reference_with_more_threads(layout: str, native: list[UnitSpec], threads: None) -> None:
    """Large enough for torch to use them; in NHWC its sums, and with them ours, depend on their number."""
    found = {}
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        ours, theirs = both("bsg exact", layout, channels=40, sides=(24, 24))
        assert_same(ours, theirs)
        found[count] = ours
    same = [all(torch.equal(found[1][name], found[count][name]) for name in found[1]) for count in (2, 3)]
    assert same == [True, True] or layout == "nhwc"


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_evaluation_uses_running_statistics_and_changes_none(layout: str, native: list[UnitSpec]) -> None:
    unit = build_unit(T, 33, gate="bsg").eval()
    unit.bn.running_mean.normal_()
    unit.bn.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(unit.state_dict())
    z, x, _ = tensors(layout)
    found = {}
    with torch.no_grad():
        for form in ("native", "reference"):
            use_implementation(unit, form)  # type: ignore[arg-type]
            found[form] = unit(z, x.unflatten(0, (T, -1)))
    assert torch.equal(found["native"], found["reference"])
    assert all(torch.equal(before[name], value) for name, value in unit.state_dict().items())


@pytest.mark.parametrize(("form", "kept"), [("plain", "z"), ("add", "z"), ("bsg", "zx"), ("post_add", "zx")])
def test_saves_z_and_at_most_the_shortcut(form: str, kept: str, native: list[UnitSpec]) -> None:
    unit = build_unit(T, 33, **FORMS[form])
    use_implementation(unit, "native")
    z, x, _ = tensors("nhwc")
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > 33:
            saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unit(z.requires_grad_(), None if form == "plain" else x.unflatten(0, (T, -1)))
    assert saved == {{"z": z, "x": x}[name].data_ptr() for name in kept}


def test_a_network_trains_in_the_native_form_as_in_the_reference(native: list[UnitSpec]) -> None:
    torch.manual_seed(0)
    network = build_model(model_config("sg_resnet18", width=0.125, num_classes=10, timesteps=T))
    reference = copy.deepcopy(network)
    use_implementation(network, "native")
    use_implementation(reference, "reference")
    images = torch.randn(2, 3, 16, 16)
    logits = [model(images) for model in (network, reference)]
    assert torch.equal(*logits)
    for answer in logits:
        answer.square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), reference.buffers(), strict=True))
    for (name, ours), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max(), name
    assert len(native) >= 17


@pytest.mark.parametrize("shape", [None, (T, B, 33, 4, 3), (T, 1, 33, 5, 4), (2 * T, 33, 5, 4)])
def test_a_shortcut_of_another_shape_is_refused(shape: tuple[int, ...] | None, native: list[UnitSpec]) -> None:
    unit = build_unit(T, 33, gate="bsg")
    use_implementation(unit, "native")
    z, x, _ = tensors("nhwc")
    assert unit(z, x.unflatten(0, (T, -1))).shape == (T, B, 33, 5, 4)
    with pytest.raises(ValueError, match=r"shortcut: .* expected \(3, 2, 33, 5, 4\) on cpu"):
        unit(z, None if shape is None else torch.zeros(shape))


def test_frames_that_no_time_step_divides_are_refused(native: list[UnitSpec]) -> None:
    unit = build_unit(T, 33)
    use_implementation(unit, "native")
    with pytest.raises(ValueError, match="z has 5 frames, expected a multiple of the 3 time steps"):
        unit(tensors("nchw")[0][:5])


def spec_of(unit: SpikingUnit) -> UnitSpec:
    assert isinstance(unit.bn, nn.BatchNorm2d)
    return UnitSpec(unit.bn, unit.neuron.dynamics(), None, "exact", False, T, False)


def test_what_the_kernels_cannot_do_has_a_reason_and_runs_in_the_lean_form(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = build_unit(T, 33)
    z, x, _ = tensors("nchw")
    assert native_unit.problem(z, None, spec_of(unit)) is None
    for other, shortcut, reason in (
        (z.double(), None, "float64"),
        (z, x.double(), "the shortcut is torch.float64"),
        (z[:0], None, "shape"),
        (z[:, :8], None, "expected [T * B, 33, H, W]"),
        (z[0], None, "expected [T * B, 33, H, W]"),
        (z.transpose(2, 3), None, "strides"),
        (z[:1, :, :1, :1].contiguous(), None, "no more than torch's threads"),
        (z.to("meta"), None, "meta"),
    ):
        assert reason in (native_unit.problem(other, shortcut, spec_of(unit)) or "")
    half = build_unit(T, 33).to(torch.bfloat16)
    assert "the batch norm is torch.bfloat16" in (native_unit.problem(z, None, spec_of(half)) or "")
    monkeypatch.setattr(native_unit, "apply", lambda *arguments: pytest.fail("the native form ran"))
    unit = build_unit(T, 33)
    unit.neuron.surrogate_function = surrogate.LeakyKReLU()
    assert "surrogate" in (native_unit.problem(z, None, spec_of(unit)) or "")
    use_implementation(unit, "native")
    assert unit(z).shape == (T, B, 33, *SIDES)
    small = torch.zeros(1, 33, *SIDES)
    assert "the membrane has shape" in (native_unit.problem(z, None, spec_of(build_unit(T, 33)), small) or "")


def test_the_check_before_the_first_use_notices_another_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_check.difference_from_lean() is None
    monkeypatch.setattr(native_unit, "_leak", lambda dynamics: ("product", 1 / (dynamics.tau or 1)))
    native_unit._spec.cache_clear()
    try:
        assert "differs from lean: spikes" in (native_check.difference_from_lean() or "")
    finally:
        native_unit._spec.cache_clear()


def test_the_check_leaves_random_numbers_and_modes_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert native_check.difference_from_lean() is None
    assert torch.equal(before, torch.get_rng_state())


REPORT = """
import torch
from spikefleet_models import kernels
from spikefleet_models.families import build_model, model_config
print(kernels.unit_form(torch.device("cpu")))
print(build_model(model_config("sg_resnet_tiny"))(torch.zeros(2, 1, 8, 8)).isfinite().all().item())
print(*sorted(name for name in __import__("sys").modules if "native" in name))
"""


def fresh_process(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """A process with an empty cache, in which the native form is wanted."""
    variables = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "SPIKEFLEET_KERNELS": "native"} | environment
    return subprocess.Popen([sys.executable, "-c", REPORT], env=variables, stdout=subprocess.PIPE, text=True)


def answer_of(process: subprocess.Popen[str]) -> list[str]:
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return shown.splitlines()


def compiler(tmp_path: Path, body: str) -> str:
    """A program in the place of the compiler."""
    file = tmp_path / "compiler"
    file.write_text(f"#!/bin/sh\nif [ $1 = --version ]; then echo 1; exit; fi\n{body}\n")
    file.chmod(0o755)
    return str(file)


def test_without_a_compiler_the_lean_form_runs_and_says_so(tmp_path: Path) -> None:
    shown = answer_of(fresh_process(tmp_path, PATH=str(tmp_path), CXX=""))
    assert shown[:2] == ["lean (no C++ compiler)", "True"]
    assert "native_unit" not in shown[2]


@needs_compiler
def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    """The compiler here copies what the real one made: its work is another test's."""
    assert kernels.native_flaw() is None
    made = native_library.load_library()._name
    log = tmp_path / "log"
    program = compiler(tmp_path, f'echo run >> {log}; sleep 1\nfor out; do :; done\ncp {made} "$out"')
    started = [fresh_process(tmp_path, CXX=program) for _ in range(2)]
    assert [answer_of(process)[:2] for process in started] == [["native", "True"]] * 2
    assert log.read_text() == "run\n"
    files = sorted(path.suffix for path in (tmp_path / "spikefleet/native").iterdir())
    assert files == [".lock", ".so"], "nothing half-written is left"


@pytest.mark.parametrize(
    ("body", "flaw"),
    [
        ("echo 'file.cpp:1: error: no such thing' >&2; exit 1", "compiler failed: file.cpp:1: error: no such thing"),
        ("exit 3", "compiler failed: status 3"),
        ('for out; do :; done; echo no library > "$out"', "cannot be loaded"),
    ],
)
def test_a_compiler_that_fails_is_named(body: str, flaw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler(tmp_path, body))
    with pytest.raises(native_library.NativeUnavailableError, match=flaw):
        native_library.load_library.__wrapped__()
    assert not [path for path in (tmp_path / "spikefleet/native").iterdir() if path.name.startswith("partial-")]
    monkeypatch.setenv("CXX", "missing-compiler")
    with pytest.raises(native_library.NativeUnavailableError, match="CXX=missing-compiler is not a program"):
        native_library.load_library.__wrapped__()


def test_a_library_that_others_can_write_is_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "library.so"
    file.touch(mode=0o700)
    native_library._refuse_files_of_others(file)
    file.chmod(0o720)
    with pytest.raises(native_library.NativeUnavailableError, match="can be written by other users"):
        native_library._refuse_files_of_others(file)


def test_named_form_is_refused_where_the_machine_cannot_compile_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "native_flaw", lambda: "no C++ compiler")
    unit = build_unit(T, 33)
    use_implementation(unit, "native")
    with pytest.raises(RuntimeError, match="the native spiking unit cannot be used: no C"):
        unit(tensors("nchw")[0])


def test_the_environment_chooses_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    apply = native_unit.apply

    def counted(*arguments: Any) -> Tensor:
        ran.append("native")
        return apply(*arguments)

    monkeypatch.setattr(native_unit, "apply", counted)
    unit, (z, _, _) = build_unit(T, 33), tensors("nchw")
    monkeypatch.setenv(kernels.CHOICE, "lean")
    assert kernels.unit_form(torch.device("cpu")) == "lean (SPIKEFLEET_KERNELS=lean)"
    unit(z)
    assert ran == []
    monkeypatch.setenv(kernels.CHOICE, "native")
    unit(z)
    assert ran == (["native"] if COMPILER else [])
    monkeypatch.setenv(kernels.CHOICE, "fast")
    with pytest.raises(ValueError, match="SPIKEFLEET_KERNELS is 'fast', expected one of native, lean"):
        kernels.unit_form(torch.device("cpu"))
