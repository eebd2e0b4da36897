"""Where the native form cannot be used there is a reason, and never a crash or a false reason."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.unit_checks import FORMS, LAYOUTS, build_unit
from spikefleet_models import kernels
from spikefleet_models.kernels import native_check, native_library
from spikefleet_models.neurons import ILIF
from spikefleet_models.spiking_unit import use_implementation
from support.cpu_forms import assert_ran, chosen_form, needs_compiler

T = 3


@pytest.fixture
def fresh_flaw() -> Iterator[None]:
    """`native_flaw` answers anew in the test, and after it."""
    kernels.native_flaw.cache_clear()
    yield
    kernels.native_flaw.cache_clear()


@needs_compiler
@pytest.mark.parametrize("threads", [60, 256])
def test_the_check_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    asked = f"import torch; torch.set_num_threads({threads}); from spikefleet_models import kernels; "
    asked += "print(torch.get_num_threads(), kernels.native_flaw())"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    shown = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, timeout=300)
    assert shown.stdout.split("\n")[0] == f"{threads} None", shown.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_check_that_does_not_finish_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> Iterator[str]:
        raise SystemExit

    def fail() -> Iterator[str]:
        raise OSError("disk is gone")

    monkeypatch.setattr(native_check, "_differences", leave)
    assert native_check.difference_from_lean() == "the check did not finish"
    monkeypatch.setattr(native_check, "_differences", fail)
    assert native_check.difference_from_lean() == "the check failed: OSError('disk is gone')"
    monkeypatch.setattr(threading.Thread, "start", lambda thread: _no_thread())
    assert native_check.difference_from_lean() == "the check failed: can't start new thread"


def _no_thread() -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("error", "flaw"),
    [
        (ModuleNotFoundError("gone", name="spikefleet_models.kernels.native_library"), "its source is not installed"),
        (
            ModuleNotFoundError("No module named 'ctypes'", name="ctypes"),
            "modules cannot be imported: No module named 'c",
        ),
        (ImportError("cannot import name 'cache'"), "its modules cannot be imported: cannot import name 'cache'"),
    ],
)
def test_only_a_missing_module_is_a_missing_source(
    error: ImportError, flaw: str, monkeypatch: pytest.MonkeyPatch, fresh_flaw: None
) -> None:
    def import_module(name: str) -> Any:
        raise error

    monkeypatch.setattr(kernels, "import_module", import_module)
    assert flaw in (kernels.native_flaw() or "")
    assert not kernels.native_needs_compiling()


def test_a_user_without_home_has_a_place_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.chdir(tmp_path)
    for named in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert native_library._folder() == tmp_path / f"spikefleet-{os.getuid()}/native"
    assert not (tmp_path / "relative").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert native_library._folder() == tmp_path / "cache/spikefleet/native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    (tmp_path / f"spikefleet-{os.getuid()}/native").chmod(0o777)
    with pytest.raises(native_library.NativeUnavailableError, match=r"no place .*home directory.*by other users"):
        native_library._folder()


@needs_compiler
def test_a_disk_that_is_full_is_a_flaw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    assert native_library.needs_compiling()
    with pytest.raises(native_library.NativeUnavailableError, match=r"\.so cannot be built: .*No space left"):
        native_library.load_library.__wrapped__()
    monkeypatch.setenv("CXX", "'c++")
    with pytest.raises(native_library.NativeUnavailableError, match=r"CXX='c\+\+ is not a command"):
        native_library.load_library.__wrapped__()


def test_nothing_needs_compiling_where_torch_lacks_its_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking() -> int:
        raise native_library.NativeUnavailableError("torch 2.9 has no torch_parallel_for")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_library, "_parallel_for", lacking)
    assert not kernels.native_needs_compiling()


def test_all_sources_are_known() -> None:
    """What is hashed, compiled and put into the code of a registered version."""
    found = Path(native_library.__file__).parent.glob("native_*.[ch]*")
    assert sorted(native_library.SOURCES) == sorted(path.name for path in found)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("form", ["plif", "ilif add", "ilif alone"])
def test_another_default_device_changes_nothing(form: str, layout: str) -> None:
    """Weights and input are on the CPU; what the native form allocates must be there too."""
    ilif = {"kind": "ilif", "bound": 4, "gate": "add"}
    unit: Any = ILIF(4) if form == "ilif alone" else build_unit(T, 33, **FORMS.get(form, ilif))
    use_implementation(unit, "auto")
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(2, 2 * T, 33, 5, 4, generator=generator).contiguous().unbind()
    z = z.contiguous(memory_format=LAYOUTS[layout])

    def computed(module: Any) -> list[torch.Tensor]:
        given = z.clone().requires_grad_()
        steps = given.unflatten(0, (T, -1))
        module.keep_state = True
        out = module(steps) if form == "ilif alone" else module(given, (x > 0).float().unflatten(0, (T, -1)))
        out.square().sum().backward()
        assert given.grad is not None
        return [out.detach(), given.grad, *(p.grad for p in module.parameters() if p.grad is not None)]

    with chosen_form("native") as ran:
        expected = computed(copy.deepcopy(unit))
        with torch.device("meta"):
            found = computed(copy.deepcopy(unit))
    assert_ran("native", ran)
    assert all(tensor.device.type == "cpu" for tensor in found)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_forms_that_ran_are_told_apart() -> None:
    """The negative control of the fixtures `lean_form` and `cpu_form`."""
    unit = build_unit(T, 33)
    with chosen_form("lean") as ran:
        unit(torch.zeros(T, 33, 5, 4))
    assert_ran("lean", ran)
    with pytest.raises(AssertionError, match="the native form did not run"):
        assert_ran("native", ran)
    with chosen_form("native") as ran:
        unit(torch.zeros(T, 33, 5, 4))
        use_implementation(unit, "lean")
        unit(torch.zeros(T, 33, 5, 4))
    assert ran == {"native": 1, "lean": 1}
    with pytest.raises(AssertionError, match="the native form ran"):
        assert_ran("lean", ran)
