"""Which form of the spiking unit runs on the CPU in a test, and whether it did."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from spikefleet_models import kernels, neurons, spiking_unit
from spikefleet_models.kernels import CpuForm, native_integers, native_unit

COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


@contextmanager
def chosen_form(form: CpuForm) -> Iterator[Counter[str]]:
    """SPIKEFLEET_KERNELS is `form`; counts calls of the functions of each form, of units and of I-LIF alone."""
    if form == "native":
        if not COMPILER:
            pytest.skip("no C++ compiler")
        assert kernels.native_flaw() is None
    ran: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.CHOICE, form)
        functions = (
            ("lean", spiking_unit, "lean_unit"),
            ("lean", neurons, "lean_integers"),
            ("native", native_unit, "apply"),
            ("native", native_integers, "apply"),
        )
        for its_form, module, name in functions:
            patch.setattr(module, name, _counted(getattr(module, name), its_form, ran))
        yield ran


def _counted(function: Callable[..., Any], form: str, ran: Counter[str]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        ran[form] += 1
        return function(*arguments)

    return counted


def assert_ran(form: CpuForm, ran: Counter[str]) -> None:
    """The form ran; the native one not where it was not chosen."""
    assert ran[form], f"the {form} form did not run"
    assert form == "native" or not ran["native"], "the native form ran"
