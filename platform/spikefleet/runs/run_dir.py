"""The directory of a run. The run's name is its identity: the same name goes on where it stopped."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikefleet.config.recipes import parse_config
from spikefleet.config.schema import Config, differences
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object, write_json
from spikefleet.plugins import loaded_plugins, missing_plugins_named
from spikefleet.training.checkpoints import CheckpointFolder, verify_checkpoint
from spikefleet_tune.lock import Lock, LockedError, hold

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_run_name(name: str) -> str:
    """Raises UserError unless the name is a plain file name."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"run name {name!r} must be 1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit; "
            "it names a directory, so it has no path separators"
        )
    return name


def default_run_name(config: Config) -> str:
    """The recipe with a digest of all that decides the result: the same command goes on with the same run."""
    return f"{config.recipe}-{config.digest()[:8]}"


@dataclass(frozen=True)
class Run:
    """A run's directory: run.json (status), config.json, data.json, checkpoints/, report/ and the tracking journal."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.path / "checkpoints")

    @property
    def exists(self) -> bool:
        return (self.path / "run.json").is_file()

    def record(self) -> dict[str, Any]:
        """Status and result as last written; empty for a run that has not begun."""
        return read_json_object(self.path / "run.json", "status") if self.exists else {}

    def note(self, **facts: Any) -> None:
        """Adds facts to run.json, atomically."""
        write_json(self.path / "run.json", {**self.record(), **facts})

    def data(self) -> DataSummary:
        """The data that the run is trained on."""
        return DataSummary.read(self.path)

    def best_checkpoint(self) -> Path:
        """The checkpoint with the best validation metric so far. Raises UserError when there is none yet."""
        latest = self.checkpoints.latest()
        best = read_json_object(latest / "state.json", "best")["best"] if latest is not None else None
        if best is None:
            raise UserError(f"run {self.name} has no evaluated checkpoint yet; train it to the end of an epoch first")
        return self.checkpoints.at(best["step"])

    def config(self) -> Config:
        """The configuration that the run was started with. Raises UserError where a plugin that it needs is missing."""
        return self.parse(read_json_object(self.path / "config.json"), origin=f"run {self.name}")

    def parse(self, config: Mapping[str, Any], origin: str) -> Config:
        """Checks a configuration that was stored with the run. Raises UserError as `config`."""
        with missing_plugins_named(self.record().get("plugins", ()), f"run {self.name}"):
            return parse_config(config, origin)

    def begin(self, config: Config, data: DataSummary) -> None:
        """Creates the run, or makes sure that it is the same training.

        Raises UserError with a field-by-field difference, or naming the damaged file of the latest checkpoint.
        """
        if not self.exists:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "config.json", config.dump())
            data.write(self.path)
            self.note(name=self.name, recipe=config.recipe, status="begun", restarts=0, plugins=list(loaded_plugins()))
            return
        complaints = self._complaints(config, data.content_hash)
        if complaints:
            raise UserError(
                f"run {self.name} was started with another configuration: {'; '.join(complaints)}. "
                "Ask for the run's own values to go on with it, or give another --name"
            )
        latest = self.checkpoints.latest()
        if latest is not None:
            verify_checkpoint(latest)

    def forget_checkpoints(self) -> None:
        """Removes all checkpoints: the run starts anew, or from another run's."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def _complaints(self, config: Config, data_hash: str) -> list[str]:
        saved = read_json_object(self.path / "config.json")
        complaints = differences(saved, config.dump())
        if (held := self.data().content_hash) != data_hash:
            complaints.append(f"data: content {held[:12]} in the run, {data_hash[:12]} now")
        return complaints

    def lock(self, patience_s: float = 0.0) -> Lock:
        """Holds the run for this process, until the end of a `with` block.

        Raises UserError when it is being trained already, after waiting for `patience_s` seconds, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return hold(self.path / ".lock", patience_s)
        except LockedError as error:
            raise UserError(
                f"run {self.name} is being trained already ({error.holder}); wait for it, or give another --name"
            ) from None
        except OSError as error:
            raise UserError(f"run directory {self.path} cannot be written: {error}; give another --runs-dir") from None


def find_run(runs_dir: Path, name: str) -> Run:
    """An existing run. Raises UserError naming those that exist."""
    run = Run(runs_dir / check_run_name(name))
    if not run.exists:
        known = sorted(path.parent.name for path in runs_dir.glob("*/run.json"))
        listed = f"it holds {', '.join(known)}" if known else "it holds none"
        raise UserError(f"there is no run {name!r} in {runs_dir}; {listed}")
    return run
