"""Fused forms of the spiking unit, and which one runs where.

Triton is imported when the first tensor on a CUDA device needs it, and the native form is compiled when the first
network asks for it: both take seconds.
"""

import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

import torch

CHOICE = "SPIKEFLEET_KERNELS"
"""Environment variable that chooses the form on the CPU."""

CpuForm = Literal["native", "lean"]

Implementation = Literal["auto", "triton", "native", "lean", "reference"]
"""What `use_implementation` takes."""

_LIBRARY = "spikefleet_models.kernels.native_library"


@cache
def load_triton_unit() -> ModuleType | None:
    """The module of the Triton form; None where Triton is not installed."""
    try:
        return import_module("spikefleet_models.kernels.triton_unit")
    except ImportError:
        return None


def load_native_unit() -> ModuleType:
    """The module of the native form; raises RuntimeError, with `native_flaw`, where it cannot be used."""
    flaw = native_flaw()
    if flaw is not None:
        raise RuntimeError(
            f"the native spiking unit cannot be used: {flaw}; install g++ or clang++, or use the form 'lean'"
        )
    return import_module("spikefleet_models.kernels.native_unit")


@cache
def native_flaw() -> str | None:
    """Why this machine cannot use the native form, compiled and checked by the first call; None where it can."""
    try:
        library = import_module(_LIBRARY)
        try:
            library.load_library()
        except library.NativeUnavailableError as error:
            return str(error)
        difference: str | None = import_module("spikefleet_models.kernels.native_check").difference_from_lean()
        return difference
    except ImportError as error:
        # The code of a version that an earlier release registered holds none of it.
        missing = isinstance(error, ModuleNotFoundError) and error.name == _LIBRARY
        return "its source is not installed" if missing else f"its modules cannot be imported: {error}"


def native_needs_compiling() -> bool:
    """Whether the first call of `native_flaw` on this machine compiles, which takes seconds."""
    try:
        library = import_module(_LIBRARY)
    except ImportError:
        return False
    needed: bool = library.needs_compiling()
    return needed


def wants_native(implementation: Implementation, device: torch.device) -> bool:
    """Whether a module with this implementation is to use the native form on a device, where that applies."""
    if torch.compiler.is_compiling() or implementation not in ("auto", "native"):
        return False
    if implementation == "native":
        return True
    return device.type == "cpu" and chosen_cpu_form() == "native" and native_flaw() is None


def load_native_integers() -> ModuleType:
    """The module of I-LIF alone in the native form; raises RuntimeError as `load_native_unit` does."""
    load_native_unit()
    return import_module("spikefleet_models.kernels.native_integers")


def chosen_cpu_form() -> CpuForm:
    """The form that this process should use on the CPU, by SPIKEFLEET_KERNELS; by default the native one.

    Raises:
        ValueError: SPIKEFLEET_KERNELS is neither `native` nor `lean`.
    """
    chosen = os.environ.get(CHOICE, "").strip() or "native"
    if chosen not in get_args(CpuForm):
        raise ValueError(f"{CHOICE} is {chosen!r}, expected one of {', '.join(get_args(CpuForm))}")
    return "native" if chosen == "native" else "lean"


def unit_form(device: torch.device) -> str:
    """The form of the spiking unit that runs on a device, with the reason where it is not the fastest one.

    Raises:
        ValueError: SPIKEFLEET_KERNELS has no known value.
    """
    if device.type == "cuda":
        unit = load_triton_unit()
        return "lean (Triton is not installed)" if unit is None else f"triton {unit.TRITON_VERSION}"
    if device.type != "cpu":
        return "lean"
    if chosen_cpu_form() == "lean":
        return f"lean ({CHOICE}=lean)"
    flaw = native_flaw()
    return "native" if flaw is None else f"lean ({flaw})"
