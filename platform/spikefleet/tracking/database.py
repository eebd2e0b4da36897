"""The local tracking database, a SQLite file: built in one step, recognised when it is incomplete, and repaired.

MLflow builds its schema by some seventy migrations without a transaction, so a signal in the middle leaves one that no
migration accepts. Here the schema is built in a temporary file, under a lock, and renamed into place.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, unquote

from spikefleet.errors import UserError
from spikefleet_tune.atomic import replacing, sync
from spikefleet_tune.lock import LockedError, hold

if TYPE_CHECKING:
    from sqlalchemy import Engine

SCHEME = "sqlite:///"

Condition = Literal["missing", "empty", "sound", "incomplete", "newer", "foreign", "damaged"]
"""State of a database file. `incomplete`: its migrations were cut short, or it is of an earlier MLflow."""

REPAIR = "spikefleet tracking repair"
"""Command that completes the schema of a database."""

_BUSY_S = 20.0
_PATIENCE_S = 600.0
_FIRST_TABLES = frozenset({"experiments", "runs", "metrics", "params", "tags", "registered_models", "model_versions"})
"""Some tables of MLflow's first schema."""
_COUNTED = ("experiments", "runs", "metrics", "params", "tags", "registered_models", "model_versions", "logged_models")
"""Tables whose rows a repair must keep."""
_build_guard = threading.Lock()  # Alembic's migrations run on state that is global to the process


def database_uri(path: Path) -> str:
    """The tracking URI of a database file.

    SQLAlchemy and MLflow read `%` and `?` of a URI differently, so a path with one of them is given by a link in the
    temporary directory of this user.

    Args:
        path: absolute, of the file.

    Raises:
        UserError: the link cannot be created.
    """
    if not set("%?#") & set(str(path)):
        return f"{SCHEME}{path}"
    links = Path(tempfile.gettempdir()) / f"spikefleet-{os.getuid()}"
    link = links / hashlib.sha256(os.fsencode(path.parent)).hexdigest()[:20]
    try:
        links.mkdir(mode=0o700, exist_ok=True)
        if links.is_symlink() or links.stat().st_uid != os.getuid():
            raise UserError(f"{links} belongs to another user; set TMPDIR to a directory of your own")
        if not link.is_symlink() or link.readlink() != path.parent:
            partial = link.with_name(f"{link.name}.{os.getpid()}-{threading.get_ident()}")
            partial.symlink_to(path.parent)
            partial.replace(link)
    except OSError as error:
        raise UserError(
            f"{path.parent} has one of the characters % ? # in its name, and no link to it can be created in {links}: "
            f"{error.strerror}; set another --runs-dir, or TMPDIR"
        ) from None
    return f"{SCHEME}{link / path.name}"


def database_path(uri: str) -> Path | None:
    """The file of a SQLite tracking URI; None for a server."""
    if not uri.startswith(SCHEME):
        return None
    return Path(unquote(uri.removeprefix(SCHEME).partition("?")[0])).absolute()


@cache
def _revisions() -> tuple[frozenset[str], str | None]:
    """MLflow's schema revisions, and the last one. Read from its files: importing it takes seconds."""
    spec = find_spec("mlflow")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    known: set[str] = set()
    parents: set[str] = set()
    for file in (path for folder in folders for path in Path(folder).glob("store/db_migrations/versions/*.py")):
        for name, value in re.findall(r"^(revision|down_revision)\b[^=\n]*=(.*)$", file.read_text(), re.MULTILINE):
            (known if name == "revision" else parents).update(re.findall(r"""["'](\w+)["']""", value))
    heads = known - parents
    return frozenset(known), heads.pop() if len(heads) == 1 else None


def condition(path: Path) -> Condition:
    """The state of a database file; it takes milliseconds and does not import MLflow."""
    if not path.exists():
        return "missing"
    try:
        with _opened(path) as database:
            tables = _tables(database)
            revision = _revision(database, tables)
    except sqlite3.Error:
        return "damaged"
    if not tables - {"alembic_version"}:
        return "empty"
    if not _FIRST_TABLES & tables:
        return "foreign"
    known, head = _revisions()
    if head is None or revision == head:
        return "sound"
    return "newer" if revision is not None and revision not in known else "incomplete"


def check_database(path: Path) -> None:
    """Raises UserError unless a database is sound or can be created; the message says what to do."""
    match condition(path):
        case "incomplete":
            raise UserError(
                f"tracking database {path} has an incomplete schema: its creation was cut short, or it is of an "
                f"earlier MLflow; run `{REPAIR}`, which keeps all runs"
            )
        case "newer":
            raise UserError(f"tracking database {path} is of a later MLflow; install the version that wrote it")
        case "foreign":
            raise UserError(f"{path} is a SQLite file of another program; set another --runs-dir or tracking URI")
        case "damaged":
            raise UserError(
                f"tracking database {path} cannot be read as SQLite; restore it from a copy, or move it away: "
                "`spikefleet tracking sync RUN` sends the records of a run again"
            )


def create_database(path: Path) -> bool:
    """Builds a database unless it is there; a kill at any moment leaves none or a whole one.

    Args:
        path: of the file; its directory is created.

    Returns:
        Whether it was created now.

    Raises:
        UserError: another process builds it for longer than ten minutes.
        OSError: it cannot be written.
    """
    if condition(path) not in ("missing", "empty"):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if condition(path) not in ("missing", "empty"):  # another process has built it
            return False
        for left in path.parent.glob(f".{path.name}.*.partial*"):  # of a killed process
            left.unlink(missing_ok=True)
        with replacing(path) as partial:
            _build(partial)
    return True


def repair_database(path: Path) -> Path | None:
    """Completes the schema of a database and keeps its rows; on an error it stays as it was.

    Rows are copied into a new database at the revision of the old one, whose migrations are then completed.

    Args:
        path: of the file.

    Returns:
        A copy of the database as it was; None if it was sound or empty.

    Raises:
        UserError: the file is not a database of MLflow, or rows cannot be kept.
    """
    with locked(path):
        found = condition(path)
        if found in ("missing", "empty", "sound"):
            return None
        if found != "incomplete":
            check_database(path)
        backup = back_up(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            _completed(path, partial)
            with _opened(partial) as source, _opened(path) as target:
                source.backup(target)  # one transaction: other processes may have the file open
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:300]
            raise UserError(
                f"tracking database {path} cannot be repaired: {reason}; it was not changed. Move it away: "
                "`spikefleet tracking sync RUN` sends the records of a run again"
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        return backup


def back_up(path: Path) -> Path:
    """Copies a database beside itself, whole even while it is being written to."""
    copy = path.with_name(f"{path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    with _opened(path) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    sync(copy)
    return copy


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a database for its creation, repair or relocation."""
    try:
        with hold(path.with_name(f".{path.name}.lock"), _PATIENCE_S):
            yield
    except LockedError as error:
        raise UserError(f"tracking database {path} is being created by {error.holder}; wait for it") from None


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """An existing database; what a killed writer left half-done is rolled back. Raises sqlite3.Error."""
    place = f"file:{quote(str(path))}?mode="
    try:
        database = _connected(place + "rw")
    except sqlite3.OperationalError:
        database = _connected(place + "ro")  # a directory that cannot be written
    with closing(database):
        yield database


def _connected(uri: str) -> sqlite3.Connection:
    database = sqlite3.connect(uri, uri=True, timeout=_BUSY_S)
    try:
        database.execute("SELECT count(*) FROM sqlite_master")
    except BaseException:
        database.close()
        raise
    return database


def _tables(database: sqlite3.Connection) -> set[str]:
    found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    return {name for (name,) in found}


def _revision(database: sqlite3.Connection, tables: set[str]) -> str | None:
    if "alembic_version" not in tables:
        return None
    row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def _build(path: Path) -> None:
    from mlflow.store.db.utils import _initialize_tables

    with _build_guard, _engine(path) as engine:
        _initialize_tables(engine)


@contextmanager
def _engine(path: Path) -> Iterator[Engine]:
    """An engine on a temporary file, which is synced once, when it is complete: seven times as fast."""
    import sqlalchemy

    def trust(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")

    url = sqlalchemy.URL.create("sqlite", database=str(path))
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool)
    sqlalchemy.event.listen(engine, "connect", trust)
    try:
        yield engine
    finally:
        engine.dispose()


def _completed(old: Path, new: Path) -> None:
    """Writes the rows of an incomplete database into a new one with the whole schema."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config, _upgrade_db
    from mlflow.store.tracking.dbmodels.initial_models import Base as FirstSchema

    with _opened(old) as database:
        revision = _revision(database, _tables(database))
    with _build_guard, _engine(new) as engine:
        FirstSchema.metadata.create_all(engine)
        if revision is not None:
            config = _get_alembic_config(str(engine.url))
            with engine.begin() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, revision)
        counts = _copy_rows(old, new)
        _upgrade_db(engine)
    with _opened(new) as database:
        for table, count in counts.items():
            kept = database.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]
            if kept < count:
                raise UserError(f"{count - kept} of {count} rows of table {table} would be lost")


def _copy_rows(old: Path, new: Path) -> dict[str, int]:
    """Copies all rows by the columns that both have; returns the number of rows of the most important tables."""
    counts: dict[str, int] = {}
    with closing(sqlite3.connect(new, isolation_level=None)) as database:
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute("ATTACH DATABASE ? AS old", (str(old),))
        database.execute("BEGIN")
        there = {name for (name,) in database.execute("SELECT name FROM old.sqlite_master WHERE type = 'table'")}
        for table in sorted(_tables(database) - {"alembic_version"}):
            # A migration renames its copy of a table last: killed just before, it leaves all rows in the copy.
            source = table if table in there else f"_alembic_tmp_{table}"
            if source not in there:
                continue
            held = _columns(database, "old", source)
            shared = ", ".join(f'"{name}"' for name in _columns(database, "main", table) if name in held)
            database.execute(f'DELETE FROM main."{table}"')
            database.execute(f'INSERT INTO main."{table}" ({shared}) SELECT {shared} FROM old."{source}"')
            if table in _COUNTED:
                counts[table] = database.execute(f'SELECT count(*) FROM main."{table}"').fetchone()[0]
        database.execute("COMMIT")
    return counts


def _columns(database: sqlite3.Connection, schema: str, table: str) -> list[str]:
    return [row[1] for row in database.execute(f'PRAGMA {schema}.table_info("{table}")')]
