"""Two trainings compared bit by bit, and a training cut back to one of its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from spikefleet.training.checkpoints import CheckpointFolder, Snapshot, load_checkpoint


def small_snapshot(best_step: int | None = None) -> Snapshot:
    """A whole snapshot of a tiny network after two epochs."""
    best = None if best_step is None else {"step": best_step, "epoch": 2, "metrics": {"top1": 0.5}}
    state = {
        "epoch": 2,
        "step_in_epoch": 0,
        "steps_per_epoch": 2,
        "world_size": 1,
        "data_hash": "d" * 64,
        "best": best,
        "history": [],
        "sums": {},
        "scaler": {},
    }
    return Snapshot({"model": {"w": torch.ones(3)}}, state, {})


def end_of(run_dir: Path) -> Snapshot:
    """The last checkpoint of a run."""
    latest = CheckpointFolder(run_dir / "checkpoints").latest()
    assert latest is not None, f"{run_dir} has no checkpoint"
    return load_checkpoint(latest)


def cut(run_dir: Path, step: int, into: Path) -> None:
    """Copies a run as it was when the checkpoint of `step` was its last; the run must have kept its checkpoints."""
    whole = CheckpointFolder(run_dir / "checkpoints")
    assert whole.at(step) in whole.committed()
    for path in whole.committed():
        if path.name <= whole.at(step).name:
            shutil.copytree(path, into / "checkpoints" / path.name)


def differences(found: Snapshot, wanted: Snapshot) -> list[str]:
    """What is not the same in every bit: weights, average, optimizer, random states, position, history."""
    told = [f"only in one: {name}" for name in found.tensors.keys() ^ wanted.tensors.keys()]
    for group in found.tensors.keys() & wanted.tensors.keys():
        ours, theirs = found.tensors[group], wanted.tensors[group]
        told += [f"only in one: {group}: {name}" for name in ours.keys() ^ theirs.keys()]
        told += [f"{group}: {name}" for name in ours.keys() & theirs.keys() if not _same(ours[name], theirs[name])]
    told += [f"state: {name}" for name in found.state.keys() | wanted.state.keys() if not _equal(found, wanted, name)]
    return sorted(told)


def assert_same_end(run_dir: Path, reference: Path) -> None:
    """The last checkpoints of two runs agree in every bit."""
    assert differences(end_of(run_dir), end_of(reference)) == []


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def _equal(found: Snapshot, wanted: Snapshot, name: str) -> bool:
    return name in found.state and name in wanted.state and bool(found.state[name] == wanted.state[name])
