"""The directory of a retraining: `retrain.json` says how far it is, so that the same command resumes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spikefleet.errors import UserError
from spikefleet.files import read_json_object, write_json
from spikefleet_tune.lock import Lock, LockedError, hold

Word = Literal["promoted", "kept", "skipped", "nothing new", "failed"]
"""How a retraining ended."""

RETRAININGS = "retrainings"
"""Directory of all retrainings in a runs directory."""

_RECORD = "retrain.json"


class Record(BaseModel):
    """The content of retrain.json. A field is written once the step that it names is done."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: str
    model: str
    identity: str
    """Hash of everything that decides the result: configuration, data, code, champion, gates."""
    champion: int | None
    """The champion when it began."""
    base: int
    """The version whose configuration is trained."""
    reasons: list[str]
    started: str
    runs: list[str] = Field(default_factory=list)
    """Names of the finished trainings, in the order of their seeds."""
    scores: list[float | None] = Field(default_factory=list)
    """Their validation metrics."""
    candidate: int | None = None
    """The registered version."""
    verdict: dict[str, Any] | None = None
    """What the gates said, before the alias was moved."""
    word: Word | None = None
    reason: str | None = None
    reported: bool = False
    """The report is written, and the run in MLflow ended."""

    @property
    def is_decided(self) -> bool:
        """Whether the alias is decided, so that only the report may be missing."""
        return self.word in ("promoted", "kept")

    def has_promoted(self, version: int | None) -> bool:
        """Whether its gates made a version champion, perhaps right before it was killed."""
        passed = self.verdict is not None and bool(self.verdict["passed"])
        return version is not None and self.candidate == version and passed


@dataclass(frozen=True)
class RetrainingFolder:
    """The directory of one retraining."""

    path: Path

    @property
    def id(self) -> str:
        """Identifies the retraining."""
        return self.path.name

    def read(self) -> Record | None:
        """What was recorded; None if it was not started. Raises UserError if the file is damaged."""
        path = self.path / _RECORD
        if not path.is_file():
            return None
        remedy = "restore it, or remove the directory to retrain anew"
        try:
            return Record.model_validate(read_json_object(path))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "it"
            raise UserError(f"{path} is damaged: {field}: {first['msg']}; {remedy}") from None
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None

    def write(self, record: Record) -> Record:
        """Records a step, atomically, and returns the record. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / _RECORD, record.model_dump(mode="json"))
        return record


class Retrainings:
    """All retrainings of a runs directory.

    Args:
        runs_dir: the runs directory.
    """

    def __init__(self, runs_dir: Path) -> None:
        self.path = runs_dir.resolve() / RETRAININGS

    def lock(self, model: str, patience_s: float = 0.0) -> Lock:
        """Locks the retraining of a model on this file system.

        Args:
            model: name of the registered model.
            patience_s: seconds to wait for another process.

        Raises:
            LockedError: another process still has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        return hold(self.path / f".{model}.lock", patience_s)

    def _latest(self, model: str, wanted: Callable[[Record], bool]) -> RetrainingFolder | None:
        for folder in reversed(self.of(model)):
            if (record := folder.read()) is not None and wanted(record):
                return folder
        return None

    def of(self, model: str) -> list[RetrainingFolder]:
        """The retrainings of a model, the latest last."""
        named = self.path.glob(f"{_stem(model)}*/{_RECORD}")  # a damaged one of another model is none of its business
        folders = [RetrainingFolder(path.parent) for path in named]
        known = [(record.started, folder) for folder in folders if (record := folder.read()) is not None]
        ours = [(started, folder) for started, folder in known if _model_of(folder) == model]
        return [folder for _, folder in sorted(ours, key=lambda pair: (pair[0], pair[1].id))]

    def unfinished(self, model: str, identity: str) -> RetrainingFolder | None:
        """A retraining of the same that has not ended, or has failed."""
        return self._latest(model, lambda record: record.identity == identity and not _has_ended(record))

    def promoted_without_report(self, model: str, champion: int | None) -> RetrainingFolder | None:
        """The retraining that made the present champion, if it has not ended.

        `unfinished` does not find it, for its identity names the champion that it has replaced.
        """
        return self._latest(model, lambda record: record.has_promoted(champion) and not _has_ended(record))

    def finished(self, model: str, identity: str) -> Record | None:
        """The last retraining of the same that ended, and did not fail."""
        found = self._latest(model, lambda record: record.identity == identity and _has_ended(record))
        return None if found is None else found.read()

    def new(self, model: str, day: str, identity: str) -> RetrainingFolder:
        """A directory that does not exist yet: `MODEL-retrain-DAY-HASH`, with a number where that is taken."""
        name = f"{_stem(model)}{day}-{identity[:8]}"
        path, number = self.path / name, 1
        while path.exists():
            number += 1
            path = self.path / f"{name}-{number}"
        return RetrainingFolder(path)


def _stem(model: str) -> str:
    return f"{model[:60]}-retrain-"


def _model_of(folder: RetrainingFolder) -> str | None:
    record = folder.read()
    return None if record is None else record.model


def _has_ended(record: Record) -> bool:
    return record.is_decided and record.reported


__all__ = ["RETRAININGS", "LockedError", "Record", "RetrainingFolder", "Retrainings", "Word"]
