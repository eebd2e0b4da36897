"""The form of the spiking unit on a CPU: one for all ranks of a run, and the same one when the run is resumed.

The native and the lean form give the same spikes, but their gradients differ in the last bits. So each checkpoint
records the form, and resumption restores it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from spikefleet.errors import UserError
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import EventSink, Note, Phase
from spikefleet_models.kernels import (
    CHOICE,
    CpuForm,
    chosen_cpu_form,
    native_flaw,
    native_needs_compiling,
    unit_form,
)
from spikefleet_models.spiking_unit import use_implementation


class SettledForm(NamedTuple):
    """The form that all ranks use."""

    form: CpuForm | None
    """None on GPUs, where each unit takes Triton's form by itself."""
    description: str
    """The form, with the reason where it is not the fastest one."""
    note: str | None = None
    """One line for the user where the form is not the fastest one, or a resumed run has another one than it had."""


class _Rank(NamedTuple):
    chosen: CpuForm
    named: bool
    """Whether the user chose it."""
    host: str
    flaw: str | None
    """Why the native form cannot be used, where it was chosen."""


def settle_form(
    networks: Iterable[nn.Module],
    group: ProcessGroup,
    sink: EventSink,
    recorded: CpuForm | None,
    compiled: bool = False,
) -> SettledForm:
    """Chooses the form on a CPU for all ranks, and sets it in the networks. Collective.

    Args:
        networks: of this rank.
        group: this process's rank and group.
        sink: is told that the native form is being compiled, which takes seconds, and the note.
        recorded: form in the checkpoint that the run is resumed from; None in a new run.
        compiled: whether `torch.compile` traces the network, which it can in the lean form alone.

    Raises:
        UserError: SPIKEFLEET_KERNELS has no known value on some rank, or it demands the native form for a new run and
            a rank cannot use that; raised on all ranks.
    """
    if group.device.type != "cpu":
        return SettledForm(None, "lean (train.compile)" if compiled else unit_form(group.device))
    settled = SettledForm("lean", "lean (train.compile)") if compiled else _settle(group, sink, recorded)
    if settled.note is not None:
        sink.emit(Note(settled.note))
    for network in networks:
        use_implementation(network, settled.form or "auto")
    return settled


def _settle(group: ProcessGroup, sink: EventSink, recorded: CpuForm | None) -> SettledForm:
    found = group.all_gather(_this_rank(sink, recorded))
    errors = [rank for rank in found if isinstance(rank, str)]
    if errors:
        raise UserError(errors[0])
    ranks: list[_Rank] = found
    other = recorded is not None and any(rank.named and rank.chosen != recorded for rank in ranks)
    if recorded == "lean":
        return SettledForm("lean", "lean (as before)", _as_before("lean", "native") if other else None)
    if recorded is None and (lean := next((rank for rank in ranks if rank.chosen == "lean"), None)) is not None:
        return SettledForm("lean", f"lean ({CHOICE}=lean on {lean.host})")
    flawed = next((number for number, rank in enumerate(ranks) if rank.flaw is not None), None)
    if flawed is None:
        return SettledForm("native", "native", _as_before("native", "lean") if other else None)
    reason = f"{ranks[flawed].flaw} on {ranks[flawed].host}"
    if recorded is None and any(rank.named for rank in ranks):
        raise UserError(
            f"{CHOICE}=native, but rank {flawed} cannot use the native spiking unit: {reason}; install g++ or "
            f"clang++ there, or unset {CHOICE}"
        )
    note = (
        f"the spiking unit has its lean form, which takes longer than the native one: {reason}; install g++ or clang++ "
        f"there, or set {CHOICE}=lean"
    )
    if recorded is not None:
        note = (
            "bits will differ from those of an uninterrupted run: it had the native spiking unit, which rank "
            f"{flawed} cannot use: {reason}; install g++ or clang++ there and resume again"
        )
    return SettledForm("lean", f"lean ({reason})", note)


def _as_before(form: CpuForm, other: CpuForm) -> str:
    """Note that the form in the checkpoint goes before the one that the user chose."""
    return (
        f"the spiking unit has its {form} form as before, not the {other} one, so that no bit differs; start a new run "
        f"for the {other} one"
    )


def _native_flaw(sink: EventSink) -> str | None:
    """Why this rank cannot use the native form. Whatever fails is a reason: other ranks wait for this one's answer."""
    try:
        if native_needs_compiling():
            sink.emit(Phase("compiling the spiking unit, once for this kind of CPU"))
        return native_flaw()
    except Exception as error:
        return f"its check failed: {error!r}"


def _this_rank(sink: EventSink, recorded: CpuForm | None) -> _Rank | str:
    """What this rank would use; what is wrong with the user's choice."""
    try:
        chosen = chosen_cpu_form()
    except ValueError as error:
        return f"{error} on {socket.gethostname()}"
    flaw = _native_flaw(sink) if (recorded or chosen) == "native" else None
    return _Rank(chosen, bool(os.environ.get(CHOICE, "").strip()), socket.gethostname(), flaw)
