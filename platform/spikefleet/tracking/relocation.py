"""A tracking database that was moved with its runs directory: its artifact locations, which are absolute, follow it."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from spikefleet.tracking.database import back_up, check_database, condition, create_database, database_path, locked

ARTIFACTS = "artifacts"
"""Name of the directory with the artifacts, beside the database."""

RUN_UID_TAG = "spikefleet.run_uid"
"""Tag by which a run is found again in MLflow."""

_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
    ("workspaces", "default_artifact_root"),
)
"""Tables and columns of MLflow with the absolute location of an artifact."""

log = logging.getLogger(__name__)


def former_places(path: Path) -> list[str]:
    """Artifact locations of a database, as it has them, that lie in the place that it was moved or copied from.

    Args:
        path: of the database, sound.
    """
    here = path.resolve().parent / ARTIFACTS
    if not here.is_dir():
        return []
    with closing(sqlite3.connect(path, timeout=20)) as database:
        roots = [root for (root,) in database.execute("SELECT DISTINCT artifact_location FROM experiments") if root]
        return [root for root in roots if _is_former(root, here, database)]


def ready_database(uri: str, create: bool = True) -> None:
    """Creates the database of a SQLite tracking URI, or lets it follow its directory; does nothing for a server.

    Args:
        uri: the tracking URI.
        create: build the database if it is missing.

    Raises:
        UserError: the database cannot be used; the message says what to do.
        OSError: it cannot be written.
    """
    path = database_path(uri)
    if path is None:
        return
    check_database(path)
    if create and create_database(path):
        return
    try:
        follow_move(path)
    except (OSError, sqlite3.Error) as error:
        log.warning("%s was moved, but its artifact locations cannot be rewritten: %s", path, error)


def follow_move(path: Path) -> None:
    """Rewrites the artifact locations of a database that was moved with its artifacts, and says so.

    Args:
        path: of the database; nothing is done unless it is sound.

    Raises:
        OSError, sqlite3.Error: it cannot be written.
    """
    if condition(path) != "sound" or not former_places(path):
        return
    here = path.resolve().parent / ARTIFACTS
    with locked(path):
        roots = former_places(path)
        if not roots:  # another process was faster
            return
        backup = back_up(path)
        with closing(sqlite3.connect(path, timeout=20)) as database, database:
            for root in roots:
                place = here.as_uri() if root.startswith("file:") else str(here)
                for table, column in _columns(database):
                    database.execute(
                        f'UPDATE "{table}" SET "{column}" = ? || substr("{column}", ?) '
                        f'WHERE "{column}" = ? OR substr("{column}", 1, ?) = ?',
                        (place, len(root) + 1, root, len(root) + 1, f"{root}/"),
                    )
    moved = ", ".join(str(_local(root).parent) for root in roots)
    log.warning(
        "the runs directory was moved from %s to %s: the artifact locations in %s were rewritten (a copy from before: "
        "%s)",
        moved,
        here.parent,
        path.name,
        backup.name,
    )


def _is_former(root: str, here: Path, database: sqlite3.Connection) -> bool:
    """Whether a location is the artifact directory of another place, of which `here` is the new one or a copy."""
    if urlsplit(root).scheme not in ("", "file"):
        return False
    old = _local(root)
    if old.name != ARTIFACTS or not old.is_absolute() or old.resolve() == here:
        return False
    if old.exists() and here.samefile(old):
        return False
    return _ours(root, database) and (
        not old.exists() or any((here / entry).is_dir() for entry in _entries(root, database))
    )


def _ours(root: str, database: sqlite3.Connection) -> bool:
    """Whether runs of spikefleet keep their artifacts below a location."""
    query = (
        "SELECT 1 FROM runs JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = ? "
        "WHERE substr(runs.artifact_uri, 1, ?) = ? LIMIT 1"
    )
    return database.execute(query, (RUN_UID_TAG, len(root) + 1, f"{root}/")).fetchone() is not None


def _entries(root: str, database: sqlite3.Connection) -> Iterator[str]:
    """Directories of runs and models below a location."""
    for table, column in (("runs", "artifact_uri"), ("logged_models", "artifact_location")):
        inside = f'SELECT "{column}" FROM "{table}" WHERE substr("{column}", 1, ?) = ? LIMIT 50'
        for (location,) in database.execute(inside, (len(root) + 1, f"{root}/")):
            words = location[len(root) + 1 :].split("/")
            yield "/".join(words[:2] if words[0] == "models" else words[:1])


def _columns(database: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    for table, column in _LOCATIONS:
        if any(row[1] == column for row in database.execute(f'PRAGMA table_info("{table}")')):
            yield table, column


def _local(root: str) -> Path:
    return Path(unquote(urlsplit(root).path)) if root.startswith("file:") else Path(root)
