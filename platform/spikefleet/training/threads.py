"""The number of torch's threads, by which floating-point sums on a CPU are split: with another one, bits differ.

This holds in deterministic mode too. So each checkpoint records the number of every rank, and resumption restores it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from spikefleet.training.distributed import ProcessGroup
from spikefleet_tune.messages import counted


def thread_counts(group: ProcessGroup) -> list[int]:
    """Torch's number of threads on each rank. Collective."""
    return group.all_gather(torch.get_num_threads())


def resume_threads(recorded: Sequence[int] | None, group: ProcessGroup) -> str | None:
    """Sets this rank's number of threads to the recorded one, unless its machine has fewer cores. Collective.

    On GPUs nothing changes: sums are those of the GPU, and threads only decode images.

    Args:
        recorded: number of threads of each rank; None in checkpoints of the first release, which change nothing.
        group: this process's rank and group.

    Returns:
        One line for the user where a number was changed or could not be; None if all ranks had theirs already.
    """
    if recorded is None or group.device.type != "cpu":
        return None
    wanted, found, cores = recorded[group.rank], torch.get_num_threads(), _cores()
    # More threads than cores would give the same bits, but would wait for one another.
    if wanted != found and wanted <= cores:
        torch.set_num_threads(wanted)
    ranks = group.all_gather((wanted, found, torch.get_num_threads(), cores))
    for rank, (was, _, used, has) in enumerate(ranks):
        if used != was:
            return (
                f"bits will differ from those of an uninterrupted run: rank {rank} ran with {counted(was, 'thread')}, "
                f"but has {counted(has, 'core')} here and runs with {counted(used, 'thread')}"
            )
    changed = [rank for rank, (was, default, _, _) in enumerate(ranks) if was != default]
    if not changed:
        return None
    was, default, _, _ = ranks[changed[0]]
    return f"torch runs with {counted(was, 'thread')} as before, not with {default}, so that no bit differs"


@contextmanager
def restored_thread_count() -> Iterator[None]:
    """Restores torch's number of threads when the block ends."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def usable_cores(control_group: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores that this process may use, or the share of them that its container may, where that is less.

    Args:
        control_group: where Linux shows the control group of this process.
    """
    quota, period = "max", "1"
    with suppress(OSError, ValueError):  # version 2, in one file
        quota, period = (control_group / "cpu.max").read_text().split()
    with suppress(OSError):  # version 1
        quota, period = (
            (control_group / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
        )
    try:
        share = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return _cores()
    return min(_cores(), share) if share > 0 else _cores()  # -1: no limit, in version 1
