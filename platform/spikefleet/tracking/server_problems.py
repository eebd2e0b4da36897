"""Why a tracking server or database cannot be used, in a few words: MLflow quotes whole stacks of its libraries."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from spikefleet.disks import disk_problem
from spikefleet.tracking.mlflow_client import public_uri

_START = "start it, or check MLFLOW_TRACKING_URI"
_CHECK = "check MLFLOW_TRACKING_URI"
_CAUSES = (
    (r"NameResolutionError|Name or service not known|Failed to resolve", "its host name is not known", _CHECK),
    (r"Connection refused", "the connection is refused", _START),
    (r"SSLError|CERTIFICATE_VERIFY_FAILED", "no connection by TLS (https) is possible", _CHECK),
    (r"[Tt]imed? ?out", "no answer comes in time", f"{_START}; MLFLOW_HTTP_REQUEST_TIMEOUT sets the seconds"),
    (
        r"error code (40[13])\b",
        "it refuses the credentials (HTTP {0})",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    (
        r"too many (\d+) error responses|error code (5\d\d)\b",
        "it reports an internal error (HTTP {0})",
        "look at its log, and run the same command again",
    ),
    (r"not in a valid JSON format|error code 40[45]\b.*'\s*<", "what answers there is no MLflow server", _CHECK),
    (r"No route to host|[Nn]etwork is unreachable", "there is no route to it", _CHECK),
    (r"ConnectionPool|Connection aborted|RemoteDisconnected|ConnectionError", "the connection breaks", _START),
)
"""Pattern in MLflow's text, cause, remedy."""
_QUOTED = re.compile(r"API request to|HTTPS?ConnectionPool|\('Connection aborted|Invalid url")
_REQUEST = re.compile(r"/api/\d+\.\d+/(?:mlflow(?:-artifacts)?/)?([\w/-]+)")


def server_cause(error: BaseException) -> tuple[str, str] | None:
    """Cause and remedy of an error of MLflow's HTTP client or of a tracking server; None for any other error."""
    text = str(error)
    if not _QUOTED.match(text):
        return None
    for pattern, cause, remedy in _CAUSES:
        if found := re.search(pattern, text, re.DOTALL):
            return cause.format(next(filter(None, found.groups()), "")), remedy
    return None


def database_problem(error: BaseException, database: Path) -> str | None:
    """The sentence for an error of an SQLite database that its disk is the cause of; None for any other error.

    Args:
        error: of MLflow.
        database: its file.
    """
    if "sqlite3." not in (text := str(error)):
        return None
    if "database or disk is full" in text:
        return disk_problem(OSError(errno.ENOSPC, ""), database)
    if "readonly database" in text:
        return (
            f"{database} cannot be written: it, or its disk, is read-only; make it writable, or set MLFLOW_TRACKING_URI"
        )
    if "database is locked" in text:
        return f"{database} is being written by another process; run the same command again"
    return None


def server_problem(error: BaseException, uri: str) -> str | None:
    """The sentence for such an error: the address, the cause, the request, what to do.

    Args:
        error: of MLflow.
        uri: of the tracking server.

    Returns:
        The sentence; None for an error of another kind.
    """
    found = server_cause(error)
    if found is None:
        return None
    cause, remedy = found
    request = _REQUEST.search(str(error))
    asked = f" (asked for {request[1]})" if request else ""
    return f"the tracking server {public_uri(uri)} cannot be used: {cause}{asked}; {remedy}"
