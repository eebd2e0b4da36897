"""Checkpoints: weights and resume state as safetensors and JSON, committed atomically, never unpickled.

A checkpoint is a directory `step-00000042`. It is written under a temporary name; its manifest `checkpoint.json`, with
the SHA-256 of every other file, is written last; then the directory is renamed. What lacks the manifest is ignored.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from spikefleet.errors import RunError, UserError
from spikefleet.files import read_json, read_json_object, sha256_of, write_json
from spikefleet.versions import library_versions
from spikefleet_models.families import build_model
from spikefleet_models.family import ModelConfig
from spikefleet_tune.atomic import sync

_MANIFEST = "checkpoint.json"
_FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """All that a training needs to go on: named groups of tensors, JSON state and the configuration."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    state: Mapping[str, Any]
    config: Mapping[str, Any]

    def under(self, config: Mapping[str, Any], **state: Any) -> Snapshot:
        """The same tensors for a training of another configuration, with parts of the state replaced."""
        return Snapshot(self.tensors, {**self.state, **state}, config)


class CheckpointFolder:
    """The checkpoints of one run. One process writes; any process reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def committed(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / _MANIFEST).is_file())

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self.committed()), None)

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Writes and commits a checkpoint. Raises RunError when storage refuses; older checkpoints stay."""
        final = self.at(step)
        if (final / _MANIFEST).is_file():
            return final
        partial = self.folder / f"partial-{step:08d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, tensors in snapshot.tensors.items():
                contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_file(contiguous, partial / f"{name}.safetensors")
            write_json(partial / "state.json", snapshot.state)
            write_json(partial / "config.json", snapshot.config)
            files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
            manifest = {"format": _FORMAT, "step": step, "versions": library_versions(), "sha256": files}
            write_json(partial / _MANIFEST, manifest)
            for path in partial.iterdir():
                sync(path)
            sync(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.replace(final)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"checkpoint {final} could not be written ({error}); free or mend that storage and resume"
            ) from error
        return final

    def prune(self, keep_last: int, keep_steps: set[int]) -> None:
        """Removes all but the newest `keep_last` and those in `keep_steps`; what cannot be removed is left."""
        kept = {*self.committed()[-keep_last:], *(self.at(step) for step in keep_steps)}
        for path in self._removable():
            if path not in kept:
                removed = path.with_name(f"partial-gone-{path.name}")
                try:
                    path.replace(removed)
                except OSError:
                    continue
                shutil.rmtree(removed, ignore_errors=True)

    def clean(self) -> None:
        """Removes what a killed writer left behind. Only the writer may call this."""
        for path in self.folder.glob("partial-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _removable(self) -> Iterator[Path]:
        yield from list(self.folder.glob("step-*"))


def load_checkpoint(path: Path) -> Snapshot:
    """Reads a checkpoint after checking the hash of every file.

    Raises UserError naming the file with its expected and found hash, or the file that is missing.
    """
    manifest = verify_checkpoint(path)
    try:
        tensors = {name[: -len(".safetensors")]: load_file(path / name) for name in manifest["sha256"] if _holds(name)}
    except SafetensorError as error:
        raise UserError(f"checkpoint {path} holds no valid safetensors: {error}") from None
    return Snapshot(tensors, read_json(path / "state.json"), read_json(path / "config.json"))


def best_network(snapshot: Snapshot, config: ModelConfig) -> nn.Module:
    """The network of a checkpoint in evaluation mode, on the CPU: with the EMA of its weights where there is one."""
    network = build_model(config)
    network.load_state_dict(dict(snapshot.tensors.get("average", snapshot.tensors["model"])))
    return network.eval()


def best_weights(path: Path) -> Path:
    """The file of the tensors that `best_network` loads. Raises UserError when a file of the checkpoint is damaged."""
    listed = verify_checkpoint(path)["sha256"]
    return path / ("average.safetensors" if "average.safetensors" in listed else "model.safetensors")


def checkpoint_hash(path: Path) -> str:
    """SHA-256 over the manifest of a committed checkpoint, and so, through its hashes, over the whole.

    Raises:
        UserError: there is no committed checkpoint.
    """
    if not (path / _MANIFEST).is_file():
        raise UserError(f"{path} is no checkpoint: it has no {_MANIFEST}")
    return sha256_of(path / _MANIFEST)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, and returns the manifest."""
    if not (path / _MANIFEST).is_file():
        raise UserError(f"{path} is no checkpoint: it has no {_MANIFEST}")
    manifest = read_json_object(path / _MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise UserError(f"checkpoint {path} has format {manifest.get('format')!r}; this version reads {_FORMAT}")
    for name, expected in manifest["sha256"].items():
        file = path / name
        found = sha256_of(file) if file.is_file() else "no such file"
        if found != expected:
            raise UserError(
                f"checkpoint file {file} is damaged: SHA-256 {found}, expected {expected}; "
                f"remove {path} to go on from the checkpoint before it"
            )
    return manifest


def _holds(name: str) -> bool:
    return name.endswith(".safetensors")


# ------------------------------------------------------------------------------------- optimizer <-> named tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state as `parameter name/state name` -> tensor."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Puts back what `optimizer_tensors` took out."""
    parameters = dict(network.named_parameters())
    optimizer.state.clear()
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][key] = tensor.to(parameter.device) if tensor.ndim else tensor
