"""How MLflow is reached: its switches, and which tracking server or database a run uses."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from spikefleet.errors import UserError

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc")


def quiet_mlflow() -> None:
    """Sets MLflow's switches: no telemetry, no pickle, no chatter, one attempt a request; what the user has set stays.

    Call it before MLflow is imported. One attempt that fails in seconds is enough because the journal repeats it; a
    retry inside of MLflow could also create a run twice.
    """
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # never left to the environment
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_UV_AUTO_DETECT": "false",  # or a registered model holds the lock file of wherever the process runs
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)


def resolve_tracking_uri(runs_dir: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else a SQLite database in `runs_dir`.

    Raises:
        UserError: the URI is of a kind that MLflow 3 no longer serves (a plain directory).
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        return f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"
    check_tracking_uri(uri)
    return uri


def check_tracking_uri(uri: str) -> None:
    scheme = uri.split(":", 1)[0].split("+", 1)[0]
    if scheme not in SCHEMES:
        raise UserError(
            f"MLFLOW_TRACKING_URI: {public_uri(uri)!r} is not a tracking server; give http(s)://HOST:PORT or "
            f"sqlite:////DIRECTORY/mlflow.db, or unset it to use a SQLite file beside the runs"
        )


def public_uri(uri: str) -> str:
    """The URI without user name and password, for whatever is shown or stored."""
    return without_credentials(uri, uri)


def without_credentials(text: str, uri: str) -> str:
    """A text about a URI, without the URI's user name and password."""
    user_and_password = urlsplit(uri).netloc.rpartition("@")[0]
    return text.replace(user_and_password + "@", "") if user_and_password else text
