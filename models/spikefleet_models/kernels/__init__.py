"""Fused forms of the spiking unit, and which one runs where.

Triton is imported when the first tensor on a CUDA device needs it: it takes seconds.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch


@cache
def load_triton_unit() -> ModuleType | None:
    """The module of the Triton form; None where Triton is not installed."""
    try:
        return import_module("spikefleet_models.kernels.triton_unit")
    except ImportError:
        return None


def unit_form(device: torch.device) -> str:
    """The form of the spiking unit that runs on a device, with the reason where it is not the fastest one."""
    if device.type != "cuda":
        return "lean"
    unit = load_triton_unit()
    return "lean (Triton is not installed)" if unit is None else f"triton {unit.TRITON_VERSION}"
