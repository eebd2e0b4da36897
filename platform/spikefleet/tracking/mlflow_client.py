"""MLflow's environment variables, and the tracking server or database of a run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from spikefleet.errors import UserError
from spikefleet.tracking.database import check_database, database_path, database_uri

DATABASE = "mlflow.db"
"""File name of the tracking database in a runs directory."""

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc")
"""Schemes of a tracking URI."""

EXTRA = "the extra spikefleet[server]"
"""What has the packages for PostgreSQL, artifacts in S3, and MLflow's login."""

_SERVERS_OF_SQL = ("postgresql", "mysql", "mssql")


def quiet_mlflow() -> None:
    """Sets defaults of MLflow's environment variables: no telemetry, no pickle, few logs, no retries.

    Values of the user stay, except for pickle. Call it before MLflow is imported. The journal repeats a failed request;
    a retry inside MLflow could create a run twice.
    """
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # not configurable
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_UV_AUTO_DETECT": "false",  # or a registered model contains the lock file of the current directory
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)


def resolve_tracking_uri(runs_dir: Path) -> str:
    """MLFLOW_TRACKING_URI, else a SQLite database in `runs_dir`.

    Raises:
        UserError: the URI has a scheme that is not supported, such as a plain directory, or names a database that
            cannot be used.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or database_uri(runs_dir.resolve() / DATABASE)
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise UserError(f"the tracking URI {uri} is no UTF-8, which MLflow cannot open; rename the directory") from None
    check_tracking_uri(uri)
    if (path := database_path(uri)) is not None:
        check_database(path)
    return uri


def local_database(runs_dir: Path) -> Path:
    """The SQLite file of MLFLOW_TRACKING_URI, else the one in `runs_dir`. Raises UserError where it is a server."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    path = database_path(uri) if uri else runs_dir.resolve() / DATABASE
    if path is None:
        raise UserError(
            f"MLFLOW_TRACKING_URI={public_uri(uri)!r} is no SQLite file; its schema is upgraded there, by `mlflow db "
            "upgrade`"
        )
    return path


def check_tracking_uri(uri: str) -> None:
    """Raises UserError unless the URI has a supported scheme."""
    scheme = uri.split(":", 1)[0].split("+", 1)[0]
    if scheme not in SCHEMES:
        raise UserError(
            f"MLFLOW_TRACKING_URI={public_uri(uri)!r} is not a tracking server; set it to http(s)://HOST:PORT or "
            "sqlite:////DIRECTORY/mlflow.db, or unset it to use a SQLite file in the runs directory"
        )
    if scheme in ("http", "https") and not _names_host(uri):
        raise UserError(f"MLFLOW_TRACKING_URI={public_uri(uri)!r} names no host; set it to {scheme}://HOST:PORT")

    if scheme == "sqlite" and urlsplit(uri).path.strip("/") in ("", ":memory:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI={uri!r} names no file, and its records would be lost; set it to "
            "sqlite:////DIRECTORY/mlflow.db"
        )
    if scheme in _SERVERS_OF_SQL:
        _check_driver(uri)


def _check_driver(uri: str) -> None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except (ArgumentError, ImportError) as error:
        reason = without_credentials(str(error).partition("\n")[0], uri)
        own = isinstance(error, ImportError) and error.name == "psycopg"
        remedy = f"install {EXTRA}" if own else "install the driver of that database"
        raise UserError(
            f"MLFLOW_TRACKING_URI={public_uri(uri)!r} cannot be used: {reason}; {remedy} "
            "into this environment, or name the one that is installed as SCHEME+DRIVER://"
        ) from None


def _names_host(uri: str) -> bool:
    """Whether a URI has a host and, if it has a port, one that is possible."""
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def public_uri(uri: str) -> str:
    """The URI without user name and password, for messages and files."""
    return without_credentials(uri, uri)


def page_of(uri: str) -> str:
    """The address of a tracking server's pages; for a database, the command that serves them."""
    return public_uri(uri) if uri.startswith("http") else f"mlflow ui --backend-store-uri {public_uri(uri)}"


def without_credentials(text: str, uri: str) -> str:
    """A text without the user name and password of a URI."""
    found = re.match(r"[^:/]+://([^/?#]*@)", uri)
    return text.replace(found[1], "") if found else text
