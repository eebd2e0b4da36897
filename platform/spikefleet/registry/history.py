"""What happened to the aliases of a registered model, which MLflow itself does not keep.

Each change is an artifact `history/000007.json` of the MLflow run `registry-NAME`, with the SHA-256 of the one before;
a tag of the model holds number and hash of the last one. So an entry that is edited, missing or cut off is noticed,
unless someone rewrites all of them and the tag. Entries are written under the lease of promotion, one after another.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from spikefleet.errors import UserError
from spikefleet.registry.package_access import registry_uri, scratch_directory
from spikefleet.registry.version import CONTENT_HASH, check_model_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

Action = Literal["promoted", "kept as challenger", "alias removed", "rolled back", "renewed", "found"]
"""What was done; `found` is an alias that was moved otherwise, by hand or by a job that was killed."""

HEAD: Final = "spikefleet.history"
"""Tag of a registered model: number and hash of the last entry."""

RUN: Final = "spikefleet.history_run"
"""Tag of a registered model: the run that has the entries."""

EXPERIMENT: Final = "spikefleet-registry"
"""MLflow experiment of the histories of all models."""

_FOLDER = "history"


@dataclass(frozen=True)
class Change:
    """One change of an alias."""

    number: int
    """From 1."""
    at: str
    """Time in UTC, ISO 8601."""
    action: Action
    alias: str
    before: int | None
    """The version that had the alias."""
    after: int | None
    """The version that has it now."""
    why: str
    by: str
    """User and host."""
    retraining: str | None
    """Id of the retraining that decided it."""
    previous: str
    """SHA-256 of the entry before; empty for the first one."""

    @property
    def text(self) -> str:
        """The entry as it is stored."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @property
    def sha256(self) -> str:
        """Hash of the stored entry."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class History:
    """The changes of a model's aliases, the oldest first, and what is wrong with the records."""

    name: str
    changes: tuple[Change, ...]
    damage: str | None = None
    """Where the chain is broken, in words; `changes` ends before it."""

    def aliases(self) -> dict[str, int]:
        """The versions of the aliases after the last change."""
        found: dict[str, int] = {}
        for change in self.changes:
            if change.after is None:
                found.pop(change.alias, None)
            else:
                found[change.alias] = change.after
        return found


def read_history(name: str, *, tracking_uri: str | None = None) -> History:
    """The changes of a model's aliases since its history is kept.

    Args:
        name: of the registered model.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Raises:
        UserError: the model does not exist, or the registry fails.
    """
    from spikefleet.registry.mlflow_store import connect, find_model

    with connect(registry_uri(tracking_uri)) as client:
        find_model(client, check_model_name(name))
        return load_history(client, name)


def load_history(client: MlflowClient, name: str) -> History:
    """The history of a model; without changes where none is kept. Raises MlflowException."""
    tags = client.get_registered_model(name).tags
    while True:
        texts = _entries(client, tags[RUN]) if RUN in tags else {}
        history = _checked(name, texts, tags.get(HEAD, ""))
        now = client.get_registered_model(name).tags if history.damage is not None else tags
        if now.get(HEAD) == tags.get(HEAD):
            return history
        tags = now  # another job has written entries since their head was read


def prepare_history(client: MlflowClient, history: History) -> None:
    """Call before an alias is moved, so that what cannot be recorded is not done either.

    Raises:
        UserError: the history is damaged, so nothing can follow it.
        MlflowException: the registry fails.
    """
    if history.damage is not None:
        raise UserError(
            f"the history of model {history.name} is damaged: {history.damage}; restore its artifacts in the MLflow "
            f"run registry-{history.name}, or delete the model's tags {HEAD} and {RUN} to begin a new history"
        )
    _run_of(client, history.name)


def append_change(
    client: MlflowClient,
    history: History,
    action: Action,
    alias: str,
    before: int | None,
    after: int | None,
    why: str,
    retraining: str | None = None,
) -> History:
    """Adds a change; the caller holds the lease of promotion, and has called `prepare_history`.

    Args:
        client: of the registry.
        history: so far, as it was read under the lease.
        action: what was done.
        alias: the alias.
        before: the version that had it.
        after: the version that has it now.
        why: in words.
        retraining: id of the retraining that decided it.

    Raises:
        MlflowException: the registry fails.
    """
    last = history.changes[-1] if history.changes else None
    change = Change(
        1 if last is None else last.number + 1,
        datetime.now(UTC).isoformat(timespec="seconds"),
        action,
        alias,
        before,
        after,
        why,
        _user(),
        retraining,
        "" if last is None else last.sha256,
    )
    run_id = _run_of(client, history.name)
    with scratch_directory() as scratch:
        file = scratch / _file_name(change.number)
        file.write_text(change.text, encoding="utf-8")
        _artifacts(client, run_id).log_artifact(str(file), _FOLDER)
    client.set_registered_model_tag(history.name, HEAD, f"{change.number} {change.sha256}")
    return History(history.name, (*history.changes, change))


def _checked(name: str, texts: dict[str, str], head: str) -> History:
    """Follows the chain. One entry after the head is of a job that was killed before it wrote the head."""
    changes: list[Change] = []
    number, _, digest = head.partition(" ")
    pinned = int(number) if number.isdecimal() else 0
    damage: str | None = None
    for position in range(1, max(pinned, len(texts)) + 1):
        file = _file_name(position)
        previous = changes[-1].sha256 if changes else ""
        change = _parse(texts.get(file))
        if change is None and position > pinned:
            break  # incomplete by a kill, and written again by the next change
        if change is None:
            damage = f"{file} is {'missing' if file not in texts else 'no entry'}"
        elif change.number != position or change.previous != previous or change.text != texts[file]:
            damage = f"{file} does not continue the entry before it"
        elif position > pinned + 1:
            damage = f"{file} is there, but the model's tag {HEAD} names {f'entry {pinned}' if pinned else 'none'}"
        elif position == pinned and change.sha256 != digest:
            damage = f"{file} is not the entry that the model's tag {HEAD} names"
        if damage is not None or change is None:
            break
        changes.append(change)
    return History(name, tuple(changes), damage)


def _parse(text: str | None) -> Change | None:
    with suppress(ValueError, TypeError):
        plain = json.loads(text or "")
        return Change(**plain)
    return None


def _file_name(number: int) -> str:
    return f"{number:06}.json"


def _entries(client: MlflowClient, run_id: str) -> dict[str, str]:
    """The stored entries by file name."""
    artifacts = _artifacts(client, run_id)
    if not artifacts.list_artifacts(_FOLDER):
        return {}
    with scratch_directory() as scratch:
        found = Path(artifacts.download_artifacts(_FOLDER, str(scratch)))
        return {file.name: file.read_text(encoding="utf-8", errors="replace") for file in sorted(found.iterdir())}


def _artifacts(client: MlflowClient, run_id: str) -> ArtifactRepository:
    """Where a run keeps its artifacts. Not by the client, which remembers it for runs of databases that moved."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    place = client.get_run(run_id).info.artifact_uri
    repository: ArtifactRepository = get_artifact_repository(place, tracking_uri=client.tracking_uri)
    return repository


def _run_of(client: MlflowClient, name: str) -> str:
    """The run `registry-NAME`; it is in an experiment of its own, so that it is not listed among trainings."""
    if held := client.get_registered_model(name).tags.get(RUN):
        return str(held)
    note = f"The history of the aliases of registered model {name}, in its artifacts."
    run = client.create_run(_experiment(client, name), run_name=f"registry-{name}", tags={"mlflow.note.content": note})
    client.set_terminated(run.info.run_id)
    client.set_registered_model_tag(name, RUN, run.info.run_id)
    return str(run.info.run_id)


def _experiment(client: MlflowClient, name: str) -> str:
    """The experiment of histories, whose artifacts lie where those of the model's trainings do."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        ours = f"name = '{name}' AND tags.`{CONTENT_HASH}` != ''"  # those of others may have no run
        version = client.search_model_versions(ours, max_results=1)[0]
        trained = client.get_experiment(client.get_run(version.run_id).info.experiment_id)
        place = None if client.tracking_uri.startswith("http") else trained.artifact_location  # a server decides itself
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(EXPERIMENT)
    return str(found.experiment_id)


def _user() -> str:
    try:
        return f"{getpass.getuser()} on {socket.gethostname()}"
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return socket.gethostname()
