"""Triton's form of the spiking unit without a GPU: interpreted on the CPU, and compiled for a Hopper GPU."""

from __future__ import annotations

import copy
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpu.unit_checks import FORMS, build_unit, outputs
from spikefleet_models import kernels, spiking_unit
from spikefleet_models.families import build_model, model_config
from spikefleet_models.spiking_unit import SpikingUnit, use_implementation
from spikefleet_models.unit_spec import UnitSpec

triton = pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux alone")

T = 3
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
MODULES = [f"spikefleet_models.kernels.{name}" for name in ("triton_forward", "triton_backward", "triton_unit")]


@pytest.fixture
def fresh_modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Imports the kernels anew, as the environment has it now; units then use them."""

    def load() -> ModuleType:
        for name in MODULES:
            monkeypatch.delitem(sys.modules, name, raising=False)
            monkeypatch.delattr(kernels, name.rpartition(".")[2], raising=False)
        unit = importlib.import_module(MODULES[-1])
        monkeypatch.setattr(spiking_unit, "load_triton_unit", lambda: unit)
        return unit

    return load


@pytest.fixture
def interpreted(fresh_modules: Callable[[], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels in Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    unit = fresh_modules()
    assert unit.INTERPRETED
    return unit


def tensors(layout: str, dtype: torch.dtype, channels: int, frames: int = 2 * T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(frames, channels, 5, 4, generator=generator) * 2 + 1
    x = (torch.rand(2 * T, channels, 5, 4, generator=generator) < 0.4).float()
    weights = torch.randn(2 * T, channels, 5, 4, generator=generator)
    z, x, weights = (tensor.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for tensor in (z, x, weights))
    return z, x, weights


def both(
    form: str, layout: str, dtype: torch.dtype = torch.float32, repeat: bool = False, change: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What Triton's form and the reference form in fp32 compute; `change` makes the reference another unit."""
    channels = 2 if layout == "nchw" else 5
    z, x, weights = tensors(layout, dtype, channels, 2 if repeat else 2 * T)
    unit = build_unit(T, channels, **FORMS[form])
    reference = copy.deepcopy(unit)
    use_implementation(unit, "triton")
    use_implementation(reference, "reference")
    if change == "gate gradient":
        assert reference.gate is not None
        reference.gate.gradient = "literal"
    elif change == "momentum":
        reference.bn.momentum = 0.2  # type: ignore[assignment]
    elif change == "threshold":
        reference.neuron.v_threshold = 1.05  # type: ignore[assignment]
    shortcut = x if unit.gate is not None or unit.post_add else None
    wide = None if shortcut is None else shortcut.float()
    ours = outputs(unit, z, shortcut, weights, repeat)
    return ours, outputs(reference, z.float(), wide, weights.float(), repeat)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 3e-6) -> None:
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["spikes"].float(), theirs["spikes"])
    for name, expected in theirs.items():
        if name.startswith("grad"):
            scale = expected.abs().max().clamp_min(1e-3)
            assert (ours[name].float() - expected).abs().max() <= tolerance * scale, name
        elif "running" in name:
            exact = ours["spikes"].dtype == torch.float32
            assert torch.equal(ours[name], expected) if exact else torch.allclose(ours[name], expected), name


@pytest.mark.parametrize("form", list(FORMS))
def test_interpreted_kernels_equal_the_reference(form: str, interpreted: ModuleType) -> None:
    ours, theirs = both(form, "nhwc")
    assert 0.02 < theirs["spikes"].mean() < 1.6
    assert_same(ours, theirs)


@pytest.mark.parametrize("form", ["plain", "bsg exact", "post_add", "plif"])
def test_one_source_serves_both_layouts(form: str, interpreted: ModuleType) -> None:
    assert_same(*both(form, "nchw"))


@pytest.mark.parametrize("form", ["plain", "plif free input"])
def test_static_input_is_normalised_once(form: str, interpreted: ModuleType) -> None:
    assert_same(*both(form, "nhwc", repeat=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_give_the_spikes_of_fp32(dtype: torch.dtype, interpreted: ModuleType) -> None:
    ours, theirs = both("bsg exact", "nhwc", dtype)
    assert ours["spikes"].dtype == ours["grad z"].dtype == dtype
    # The interpreter cuts bf16 off where a GPU rounds.
    assert_same(ours, theirs, tolerance=2**-7 if dtype == torch.bfloat16 else 2**-10)


@pytest.mark.parametrize(
    ("form", "change"), [("bsg exact", "gate gradient"), ("plain", "momentum"), ("lif", "threshold")]
)
def test_the_comparison_notices_another_unit(form: str, change: str, interpreted: ModuleType) -> None:
    with pytest.raises(AssertionError):
        assert_same(*both(form, "nhwc", change=change))


def test_evaluation_uses_running_statistics_and_changes_none(interpreted: ModuleType) -> None:
    unit = build_unit(T, 5, gate="bsg").eval()
    unit.bn.running_mean.normal_()
    unit.bn.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(unit.state_dict())
    z, x, _ = tensors("nhwc", torch.float32, 5)
    found = {}
    with torch.no_grad():
        for form in ("triton", "reference"):
            use_implementation(unit, form)  # type: ignore[arg-type]
            found[form] = unit(z, x.unflatten(0, (T, -1)))
    assert torch.equal(found["triton"], found["reference"])
    assert all(torch.equal(before[name], value) for name, value in unit.state_dict().items())


def test_saves_z_and_at_most_the_shortcut(interpreted: ModuleType) -> None:
    unit = build_unit(T, 5, gate="bsg")
    use_implementation(unit, "triton")
    z, x, _ = tensors("nhwc", torch.float32, 5)
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > 5:
            saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unit(z.requires_grad_(), x.unflatten(0, (T, -1)))
    assert saved == {z.data_ptr(), x.data_ptr()}


@pytest.fixture
def hopper(fresh_modules: Callable[[], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Kernels by name, compiled for sm_90 by what launches them and not launched: there is no device here."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = {
        "get_current_device": lambda: 0,
        "get_current_stream": lambda device: 0,
        "get_current_target": lambda: GPUTarget("cuda", 90, 32),
    }
    compiled: dict[str, Any] = {}
    run = triton.JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled[self.fn.__name__] = run(self, *arguments, grid=grid, warmup=True, **options)
        return compiled[self.fn.__name__]

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(**device))
    unit = fresh_modules()
    monkeypatch.setattr(unit, "INTERPRETED", True)  # tensors on the CPU stand for the device's
    return compiled


def registers(kernel: Any, tmp_path: Path) -> tuple[int, int]:
    """Registers and stack of a thread."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shown = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found is not None, shown
    return int(found[1]), int(found[2])


COMPILED = [
    ("bsg exact", "nhwc", torch.bfloat16, False),
    ("plif", "nchw", torch.float32, False),
    ("plain", "nhwc", torch.bfloat16, True),
]


@pytest.mark.skipif(not shutil.which("true") or sys.platform != "linux", reason="ptxas runs on Linux")
@pytest.mark.parametrize(("form", "layout", "dtype", "repeat"), COMPILED)
def test_kernels_compile_for_sm_90(
    form: str, layout: str, dtype: torch.dtype, repeat: bool, hopper: dict[str, Any], tmp_path: Path
) -> None:
    unit = build_unit(4, 32, **FORMS[form])
    use_implementation(unit, "triton")
    z = torch.randn(4 if repeat else 16, 32, 8, 8).to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    shortcut = torch.zeros(4, 4, 32, 8, 8, dtype=dtype, requires_grad=True)
    spikes = unit.repeat_over_time(z) if repeat else unit(z, shortcut if unit.gate is not None else None)
    spikes.sum().backward()
    assert compiled_names(hopper) == {"forward", "backward_sums", "finish_sums", "backward_input"}
    for name, kernel in hopper.items():
        assert registers(kernel, tmp_path)[1] <= 16, f"{name} spills"
        if name != "finish_sums":
            assert "ld.global.v" in kernel.asm["ptx"], f"{name} loads elements one by one"
    # The only fused multiply-add is that of the normalisation, one for each element and step of a thread.
    normalised = 512 // 128 * (1 if repeat else 4)
    assert len(re.findall(r"fma\.rn", hopper["forward"].asm["ptx"])) == normalised


def test_fused_multiply_adds_would_be_noticed(hopper: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The leak is a product, as on CUDA; with Triton's own option it becomes part of a fused multiply-add."""
    module = sys.modules[MODULES[-1]]
    monkeypatch.setattr(module, "_leak", lambda dynamics, on_cuda: ("factor", 1 / 3))
    plan_of = module._plan_of
    found = {}
    for fused in (False, True):

        def changed(*arguments: Any, fused: bool = fused) -> Any:
            plan = plan_of(*arguments)
            plan.forward.arguments["enable_fp_fusion"] = fused
            return plan

        monkeypatch.setattr(module, "_plan_of", changed)
        unit = build_unit(4, 32, **FORMS["lif tau 3"])
        use_implementation(unit, "triton")
        with torch.no_grad():
            unit(torch.randn(16, 32, 8, 8).contiguous(memory_format=torch.channels_last))
        found[fused] = len(re.findall(r"fma\.rn", hopper["forward"].asm["ptx"]))
    assert found[False] == 16 < found[True]


def compiled_names(compiled: dict[str, Any]) -> set[str]:
    return set(compiled)


def spec_of(unit: SpikingUnit, timesteps: int = T) -> UnitSpec:
    assert isinstance(unit.bn, nn.BatchNorm2d)
    return UnitSpec(unit.bn, unit.neuron.dynamics(), None, "exact", False, timesteps, False)  # type: ignore[union-attr]


def test_what_the_kernels_cannot_do_has_a_reason(interpreted: ModuleType) -> None:
    unit = build_unit(T, 5)
    z = torch.zeros(2 * T, 5, 4, 4)
    assert interpreted.problem(z, spec_of(unit)) is None
    assert "float64" in interpreted.problem(z.double(), spec_of(unit))
    assert "at most 32" in interpreted.problem(z, spec_of(unit, timesteps=33))
    assert "0 elements" in interpreted.problem(z[:0], spec_of(unit))
    unit.neuron.surrogate_function = type("Other", (nn.Module,), {})()
    assert "Other" in interpreted.problem(z, spec_of(unit))


@pytest.mark.parametrize("shape", [None, (T, 2, 5, 5, 3), (T, 1, 5, 5, 4), (2 * T, 5, 5, 4)])
def test_a_shortcut_of_another_shape_is_refused(shape: tuple[int, ...] | None, interpreted: ModuleType) -> None:
    unit = build_unit(T, 5, gate="bsg")
    use_implementation(unit, "triton")
    z, x, _ = tensors("nhwc", torch.float32, 5)
    assert unit(z, x.unflatten(0, (T, -1))).shape == (T, 2, 5, 5, 4)
    with pytest.raises(ValueError, match=r"shortcut: .* expected \(3, 2, 5, 5, 4\) on cpu"):
        unit(z, None if shape is None else torch.zeros(shape))


def test_planes_of_one_element(interpreted: ModuleType) -> None:
    unit = build_unit(T, 5)
    reference = copy.deepcopy(unit)
    use_implementation(unit, "triton")
    use_implementation(reference, "reference")
    z = torch.randn(4 * T, 5, 1, 1)
    weights = torch.randn(4 * T, 5, 1, 1)
    assert_same(outputs(unit, z, None, weights, False), outputs(reference, z, None, weights, False))


def test_named_form_is_refused_where_it_cannot_run(fresh_modules: Callable[[], ModuleType]) -> None:
    fresh_modules()
    unit = build_unit(T, 5)
    use_implementation(unit, "triton")
    with pytest.raises(RuntimeError, match="z is on cpu, expected a CUDA device"):
        unit(torch.zeros(2 * T, 5, 4, 4))


def test_without_triton_the_lean_form_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load_triton_unit", lambda: None)
    assert kernels.unit_form(torch.device("cuda")) == "lean (Triton is not installed)"
    monkeypatch.setenv(kernels.CHOICE, "lean")
    assert kernels.unit_form(torch.device("cpu")) == "lean (SPIKEFLEET_KERNELS=lean)"
    monkeypatch.undo()
    assert kernels.unit_form(torch.device("cuda")) == f"triton {triton.__version__}"


@pytest.mark.parametrize("name", ["nativ", "Lean", ""])
def test_other_names_of_forms_are_refused(name: str) -> None:
    network = build_model(model_config("sg_resnet18", width=0.125))
    with pytest.raises(ValueError, match="expected one of auto, triton, native, lean, reference"):
        use_implementation(network, name)  # type: ignore[arg-type]
