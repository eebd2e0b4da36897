"""Checkpoints: weights and resume state as safetensors and JSON, committed atomically, never unpickled.

A checkpoint is a directory `step-00000042`. It is written under a temporary name; its manifest `checkpoint.json`, with
the SHA-256 of every other file, is written last; then the directory is renamed. Without a manifest it is ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from spikefleet.config.renamed import with_current_keys
from spikefleet.disks import disk_problem
from spikefleet.errors import RunError, UserError
from spikefleet.files import read_json, read_json_object, sha256_of, write_json
from spikefleet.training.checkpoint_state import CheckpointState
from spikefleet.versions import library_versions
from spikefleet_models.families import build_model
from spikefleet_models.family import ModelConfig
from spikefleet_tune.atomic import sync

INITIAL_WEIGHTS = "initial.safetensors"
"""File name in a run's directory of the weights that it starts from."""

MANIFEST = "checkpoint.json"
"""File name of a checkpoint's manifest, which commits it."""
_STATE = "state.json"
_REPLACED = "replaced-"
_DAMAGED = "damaged-"
_FORMAT = 2
_READABLE = (1, 2)
"""Format 1 has no hash of the manifest itself."""
_NEEDED = ("config.json", _STATE, "model.safetensors")
_FILE_NAME = re.compile(r"[a-z]+\.(json|safetensors)")


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, with which training resumes."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """Groups of tensors: model, optimizer, random, and maybe branches and average (the EMA)."""
    state: Mapping[str, Any]
    """Plain data: position, best checkpoint, history, scaler."""
    config: Mapping[str, Any]
    """The dumped configuration, with current keys."""

    def under(self, config: Mapping[str, Any], **state: Any) -> Snapshot:
        """The same tensors with another configuration, and with parts of the state replaced."""
        return Snapshot(self.tensors, {**self.state, **state}, config)


class CheckpointFolder:
    """The checkpoints of one run. One process writes; any process reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def committed(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / MANIFEST).is_file())

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self.committed()), None)

    def at(self, step: int) -> Path:
        """Directory of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Writes and commits a checkpoint; one of the same position that is already committed stays.

        A training that was asked to stop commits the end of an epoch before its evaluation; the evaluation replaces it.

        Args:
            step: optimizer steps done.
            snapshot: the content.

        Returns:
            The directory of the checkpoint.

        Raises:
            RunError: the checkpoint cannot be written; older checkpoints stay.
        """
        final = self.at(step)
        if (final / MANIFEST).is_file() and self._has_position(final, snapshot):
            return final
        partial = self.folder / f"partial-{step:08d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, tensors in snapshot.tensors.items():
                contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_file(contiguous, partial / f"{name}.safetensors")
            write_json(partial / _STATE, snapshot.state)
            write_json(partial / "config.json", snapshot.config)
            files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
            manifest = {"format": _FORMAT, "step": step, "versions": library_versions(), "sha256": files}
            write_json(partial / MANIFEST, {**manifest, "manifest_sha256": _manifest_hash(manifest)})
            for path in partial.iterdir():
                sync(path)
            sync(partial)
            replaced = final.with_name(f"{_REPLACED}{final.name}")
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                final.replace(replaced)
            partial.replace(final)
            sync(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"checkpoint {final} cannot be written: {disk_problem(error, final) or error}; free disk space or fix "
                "the storage, then resume"
            ) from error
        return final

    def set_damaged_aside(self, epochs: int) -> list[str]:
        """Renames damaged checkpoints newer than the newest usable one, so that training resumes from that.

        At the end of training, the best checkpoint must be intact too. Only the writer may call this.

        Args:
            epochs: of the whole training.

        Returns:
            What was damaged, a sentence for each.

        Raises:
            UserError: no checkpoint is usable; nothing is renamed.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.committed()):
            try:
                verify_checkpoint(path)
                state = CheckpointState.of(read_json(path / _STATE), path)
                if state.epoch >= epochs and state.best is not None:
                    verify_checkpoint(self.at(state.best.step))
            except UserError as error:
                damaged.append((path, str(error)))
            else:
                break
        else:
            if damaged:
                raise UserError(
                    f"{damaged[0][1]}; no checkpoint before it can be used: set another --name, or remove "
                    f"{self.folder} to start from scratch"
                )
        for path, _ in damaged:
            aside = path.with_name(f"{_DAMAGED}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
        return [f"{reason.partition('; ')[0]}; it was set aside as {_DAMAGED}{path.name}" for path, reason in damaged]

    def is_intact(self, step: int) -> bool:
        """Whether the checkpoint of a step is there, with every file as it was written."""
        try:
            verify_checkpoint(self.at(step))
        except UserError:
            return False
        return True

    def newest_state(self) -> CheckpointState | None:
        """The state of the newest checkpoint whose state is intact; None if there is no checkpoint.

        Raises:
            UserError: the states of all checkpoints are damaged.
        """
        first: UserError | None = None
        for path in reversed(self.committed()):
            try:
                _check_files(path, _checked_manifest(path), [_STATE])
                return CheckpointState.of(read_json(path / _STATE), path)
            except UserError as error:
                first = first or error
        if first is not None:
            raise first
        return None

    def prune(self, keep_last: int, keep_steps: set[int]) -> None:
        """Removes all checkpoints but the newest `keep_last` and those of `keep_steps`; errors are ignored."""
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
        """Removes incomplete checkpoints of a killed writer. Only the writer may call this."""
        for path in self.folder.glob(f"{_REPLACED}*"):
            final = path.with_name(path.name.removeprefix(_REPLACED))
            if not final.exists():  # killed between two renames
                path.replace(final)
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("partial-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _has_position(self, path: Path, snapshot: Snapshot) -> bool:
        try:
            state = read_json_object(path / _STATE)
        except UserError:
            return False
        return all(state.get(key) == snapshot.state.get(key) for key in ("epoch", "step_in_epoch"))

    def _removable(self) -> Iterator[Path]:
        yield from list(self.folder.glob("step-*"))


def load_checkpoint(path: Path) -> Snapshot:
    """Verifies the hash of every file of a checkpoint, then reads it.

    Raises:
        UserError: a file is missing or damaged; the message has the expected and the found hash.
    """
    manifest = verify_checkpoint(path)
    try:
        tensors = {name[: -len(".safetensors")]: load_file(path / name) for name in manifest["sha256"] if _holds(name)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} has an invalid safetensors file: {error}") from None
    config = read_json_object(path / "config.json")
    return Snapshot(tensors, read_json_object(path / _STATE), with_current_keys(config))


def best_network(snapshot: Snapshot, config: ModelConfig) -> nn.Module:
    """The network of a checkpoint in evaluation mode, on the CPU; with the EMA of its weights if there is one."""
    network = build_model(config)
    with fitting_tensors():
        network.load_state_dict(dict(snapshot.tensors.get("average", snapshot.tensors["model"])))
    return network.eval()


def load_initial_weights(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """Reads the weights that a training starts from.

    Args:
        path: a safetensors file with the state dict of a network.
        sha256: of the file.

    Raises:
        UserError: the file is missing, or another one.
    """
    try:
        found = sha256_of(path)
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"train.initial_weights: {path} cannot be read: {error}; start the run anew") from None
    if found != sha256:
        raise UserError(
            f"train.initial_weights={sha256[:12]}..., but {path} has SHA-256 {found[:12]}...; restore it, or start "
            "the run anew under another --name"
        )
    return tensors


@contextmanager
def fitting_tensors() -> Iterator[None]:
    """A block that puts the tensors of a checkpoint in their places. Raises UserError where they do not fit."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise UserError(
            f"the tensors of the checkpoint are not those of its configuration: {reason}; remove it to resume from the "
            "checkpoint before it"
        ) from None


def best_weights(path: Path) -> Path:
    """The file of the weights that `best_network` loads. Raises UserError if a file of the checkpoint is damaged."""
    listed = verify_checkpoint(path)["sha256"]
    return path / ("average.safetensors" if "average.safetensors" in listed else "model.safetensors")


def checkpoint_hash(path: Path) -> str:
    """SHA-256 of the manifest of a checkpoint, which covers all files through their hashes.

    Raises:
        UserError: there is no committed checkpoint.
    """
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is not a checkpoint: it has no {MANIFEST}")
    return sha256_of(path / MANIFEST)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, and returns the manifest.

    Raises:
        UserError: there is no committed checkpoint, its format is unknown, or a file is missing or damaged.
    """
    manifest = _checked_manifest(path)
    _check_files(path, manifest, manifest["sha256"])
    return manifest


def _checked_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which is whole; the files that it lists are not looked at."""
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is not a checkpoint: it has no {MANIFEST}")
    manifest = read_json_object(path / MANIFEST)
    if manifest.get("format") not in _READABLE:
        raise UserError(
            f"checkpoint {path}: expected format {_FORMAT}, found {manifest.get('format')!r}; use the spikefleet that "
            "wrote it"
        )
    signed = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    listed = manifest.get("sha256")
    whole = manifest["format"] == 1 or manifest.get("manifest_sha256") == _manifest_hash(signed)
    if not whole or not isinstance(listed, dict) or not all(map(_FILE_NAME.fullmatch, listed)):
        raise UserError(
            f"checkpoint {path} is damaged: {MANIFEST} is not as it was written; remove it to resume from the "
            "checkpoint before it"
        )
    if lacking := [name for name in _NEEDED if name not in listed]:
        raise UserError(f"checkpoint {path} is damaged: {MANIFEST} does not list {', '.join(lacking)}")
    return manifest


def _check_files(path: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        file, expected = path / name, manifest["sha256"].get(name)
        try:
            found = sha256_of(file)
        except OSError as error:
            found = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        if found != expected:
            raise UserError(
                f"checkpoint file {file} is damaged: expected SHA-256 {expected}, found {found}; "
                f"remove {path} to resume from the checkpoint before it"
            )


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _holds(name: str) -> bool:
    return name.endswith(".safetensors")


# ------------------------------------------------------------------------------------- optimizer <-> named tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, torch.Tensor]:
    """The state of an optimizer as tensors by `PARAMETER NAME/STATE NAME`."""
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
    """Restores the state of an optimizer, in place, from the tensors of `optimizer_tensors`."""
    parameters = dict(network.named_parameters())
    optimizer.state.clear()
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][key] = tensor.to(parameter.device) if tensor.ndim else tensor
