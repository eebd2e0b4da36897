"""The directory of a run. The name identifies the run: the same name resumes it."""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spikefleet.config.recipes import parse_config
from spikefleet.config.renamed import with_current_keys
from spikefleet.config.schema import Config, differences
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object, write_json
from spikefleet.plugins import loaded_plugins, missing_plugins_named
from spikefleet.tracking.mlflow_client import DATABASE
from spikefleet.tracking.relocation import ARTIFACTS
from spikefleet.training.checkpoints import CheckpointFolder
from spikefleet.training.mirror_owner import user_name
from spikefleet_tune.lock import Lock, LockedError, hold

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


_RESERVED = frozenset({ARTIFACTS, "searches", "reproductions", "retrainings", "stores"})
"""Names in a runs directory that are not those of runs."""


def check_run_name(name: str) -> str:
    """Returns the name. Raises UserError unless it is a plain file name that the runs directory does not need."""
    if name.lower() in _RESERVED or name.lower().startswith(DATABASE):
        raise UserError(
            f"run name {name!r} is reserved: the runs directory keeps {', '.join((DATABASE, *sorted(_RESERVED)))} for "
            "itself; set another --name"
        )
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"run name {name!r} must have 1 to 100 letters, digits, '.', '_' or '-', and start with a letter or digit"
        )
    return name


def default_run_name(config: Config) -> str:
    """The recipe with a digest of the fields that affect the result, so that the same command resumes the run."""
    return f"{config.recipe}-{config.digest()[:8]}"


class RunRecord(BaseModel):
    """The content of run.json; fields of later versions are kept."""

    model_config = ConfigDict(strict=True, extra="allow")

    status: str
    id: str | None = None
    """Of this directory: no other run of the same name has it."""
    user: str | None = None
    name: str | None = None
    recipe: str | None = None
    restarts: int = Field(0, ge=0)
    plugins: list[str] = Field(default_factory=list)
    threads: list[int] | None = None
    reason: str | None = None
    signal: str | None = None
    code_version: str | None = None
    store: str | None = None
    registered: str | None = None
    validation: dict[str, float] | None = None
    test: dict[str, float] | None = None
    last: dict[str, float] | None = None
    ended: dict[str, Any] | None = None
    """Why a finished run ended before its last epoch ("why"), "epoch", "epochs", and "max_minutes" if that was it."""
    segments: list[dict[str, Any]] | None = None
    """Of a run that was trained further after its end: the result of each segment, oldest first."""
    progress: dict[str, Any] | None = None
    waiting: dict[str, Any] | None = None
    """What the run waits for ("for"), and since when ("since")."""

    @model_validator(mode="after")
    def _finished_with_metrics(self) -> Self:
        if self.status == "finished" and (self.validation is None or self.test is None):
            raise ValueError("a finished run has metrics in validation and test")
        return self


@dataclass(frozen=True)
class Run:
    """A run's directory: run.json (status), config.json, data.json, checkpoints/, report/ and the tracking journal."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The checkpoints of the run."""
        return CheckpointFolder(self.path / "checkpoints")

    @property
    def exists(self) -> bool:
        """Whether the run was started."""
        return (self.path / "run.json").is_file()

    def record(self) -> dict[str, Any]:
        """The content of run.json: status and result; empty if the run was not started.

        Raises:
            UserError: a field is missing or of another type.
        """
        if not self.exists:
            return {}
        path = self.path / "run.json"
        plain = read_json_object(path, "status")
        try:
            return RunRecord.model_validate(plain).model_dump(exclude_unset=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"{path} is damaged: {'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}; restore it, or set "
                "another --name"
            ) from None

    def note(self, **fields: Any) -> None:
        """Updates fields of run.json, atomically."""
        write_json(self.path / "run.json", {**self.record(), **fields})

    def data(self) -> DataSummary:
        """Reads the summary of the run's data. Raises UserError if it is missing or damaged."""
        return DataSummary.read(self.path)

    def best_checkpoint(self) -> Path:
        """The checkpoint with the best validation metric so far. Raises UserError if there is none yet."""
        state = self.checkpoints.newest_state()
        if state is None or state.best is None:
            raise UserError(f"run {self.name} has no evaluated checkpoint yet; train it to the end of its first epoch")
        return self.checkpoints.at(state.best.step)

    def config(self) -> Config:
        """The configuration that the run was started with. Raises UserError where a plugin that it needs is missing."""
        return self.parse(with_current_keys(read_json_object(self.path / "config.json")), origin=f"run {self.name}")

    def parse(self, config: Mapping[str, Any], origin: str) -> Config:
        """Checks a configuration that was stored with the run. Raises UserError as `config`."""
        with missing_plugins_named(self.record().get("plugins", ()), f"run {self.name}"):
            return parse_config(config, origin)

    def begin(self, config: Config, data: DataSummary) -> None:
        """Creates the run, or checks that an existing one can be resumed with this configuration and data.

        Raises:
            UserError: the configuration or the data differs (the message lists the fields), or all checkpoints are
                damaged. A damaged one is set aside, with a warning, if there is another one before it.
        """
        if not self.exists:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "config.json", config.dump())
            data.write(self.path)
            self.note(
                id=uuid.uuid4().hex,
                user=user_name(),
                name=self.name,
                recipe=config.recipe,
                status="created",
                restarts=0,
                plugins=list(loaded_plugins()),
            )
            return
        differing = self._differences(config, data.content_hash)
        if differing:
            extended = "segments" in self.record()
            remedy = f"it was extended: --resume {self.name} resumes it" if extended else "use its values to resume it"
            raise UserError(
                f"run {self.name} was started with another configuration: {'; '.join(differing)}; "
                f"{remedy}, or set another --name"
            )
        if "id" not in self.record():  # of an earlier version
            self.note(id=uuid.uuid4().hex, user=user_name())
        if self.data() != data:  # equal data with another name, or of an earlier version without one
            data.write(self.path)
        for damage in self.checkpoints.set_damaged_aside(config.train.epochs):
            log.warning("%s", damage)

    def forget_checkpoints(self) -> None:
        """Removes all checkpoints, so that the run starts from scratch or from another run's checkpoint."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def _differences(self, config: Config, data_hash: str) -> list[str]:
        saved = read_json_object(self.path / "config.json")
        differing = differences(saved, config.dump())
        if (held := self.data().content_hash) != data_hash:
            differing.append(f"data: expected content hash {held[:12]}, found {data_hash[:12]}")
        return differing

    def lock(self, patience_s: float = 0.0) -> Lock:
        """Locks the run for this process, until the end of a `with` block.

        Args:
            patience_s: seconds to wait for another process.

        Raises:
            UserError: another process is training the run, or its directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return hold(self.path / ".lock", patience_s)
        except LockedError as error:
            raise UserError(
                f"run {self.name} is already being trained ({error.holder}); wait for it, or set another --name"
            ) from None
        except OSError as error:
            raise UserError(f"run directory {self.path} cannot be written: {error}; set another --runs-dir") from None


def find_run(runs_dir: Path, name: str) -> Run:
    """An existing run, by its name or by its directory, as a shell completes it.

    Raises UserError, with the names of all runs, for an unknown one.
    """
    if "@" in name:  # as `registry` takes it
        raise UserError(f"{name!r} is not a run; for a registered version write models:/{name}")
    run = Run(runs_dir / check_run_name(_name_of(runs_dir, name)))
    if not run.exists:
        known = sorted(path.parent.name for path in runs_dir.glob("*/run.json"))
        listed = f"expected one of {', '.join(known)}" if known else "it has no runs"
        raise UserError(f"run {name!r} does not exist in {runs_dir}; {listed}")
    return run


def _name_of(runs_dir: Path, given: str) -> str:
    """The name of a run that is given by its directory; else what is given.

    Raises:
        UserError: the directory is that of a run in another runs directory, whose tracking database is there too.
    """
    path = Path(given)
    if len(path.parts) < 2 or not Run(path).exists:
        return given
    place = path.resolve()
    if place.parent != runs_dir.resolve():
        raise UserError(f"run {given} is not in {runs_dir}; give --runs-dir {place.parent} and the name {place.name}")
    return place.name
