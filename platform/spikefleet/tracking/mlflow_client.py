"""MLflow's environment variables, and the tracking server or database of a run."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from spikefleet.errors import UserError

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc")
"""Schemes of a tracking URI."""


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
        UserError: the URI has a scheme that is not supported, such as a plain directory.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        return f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"
    check_tracking_uri(uri)
    return uri


def check_tracking_uri(uri: str) -> None:
    """Raises UserError unless the URI has a supported scheme."""
    scheme = uri.split(":", 1)[0].split("+", 1)[0]
    if scheme not in SCHEMES:
        raise UserError(
            f"MLFLOW_TRACKING_URI={public_uri(uri)!r} is not a tracking server; set it to http(s)://HOST:PORT or "
            "sqlite:////DIRECTORY/mlflow.db, or unset it to use a SQLite file in the runs directory"
        )


def public_uri(uri: str) -> str:
    """The URI without user name and password, for messages and files."""
    return without_credentials(uri, uri)


def page_of(uri: str) -> str:
    """The address of a tracking server's pages; for a database, the command that serves them."""
    return public_uri(uri) if uri.startswith("http") else f"mlflow ui --backend-store-uri {public_uri(uri)}"


def without_credentials(text: str, uri: str) -> str:
    """A text without the user name and password of a URI."""
    user_and_password = urlsplit(uri).netloc.rpartition("@")[0]
    return text.replace(user_and_password + "@", "") if user_and_password else text
