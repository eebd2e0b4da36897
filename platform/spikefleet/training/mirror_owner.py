"""Whose a mirror is: the run directory that writes it.

The name alone does not tell: the default name of a run is its recipe with a digest, which two people share who train
the same. So each run directory has an id, in its `run.json`, and the mirror holds the record of the one that writes it.
"""

from __future__ import annotations

import getpass
import json
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from spikefleet.errors import UserError
from spikefleet.files import read_json_object

OWNER = "owner.json"
"""File name of the record in a mirror."""


@dataclass(frozen=True)
class Owner:
    """The run directory that writes a mirror."""

    id: str
    """Of the run directory."""
    user: str
    """Who started the run."""
    host: str
    directory: str
    at: str
    """When it wrote to the mirror last: UTC, ISO 8601."""

    @classmethod
    def of(cls, run_dir: Path) -> Owner:
        """The owner that a run directory is; without a `run.json` its id is its place.

        Raises:
            UserError: `run.json` is damaged.
        """
        path, place = run_dir / "run.json", str(run_dir.resolve())
        record = read_json_object(path) if path.is_file() else {}
        host = socket.gethostname()
        return cls(
            str(record.get("id") or f"{host}:{place}"), str(record.get("user") or user_name()), host, place, _now()
        )

    @classmethod
    def parse(cls, content: bytes | None) -> Owner | None:
        """The owner in a record; None if there is no record, or one that was cut short."""
        try:
            plain = json.loads(content or b"null")
            return cls(**{name: str(plain[name]) for name in cls.__dataclass_fields__})
        except (ValueError, TypeError, KeyError):
            return None

    def content(self) -> bytes:
        """The record, as written now."""
        return json.dumps({**asdict(self), "at": _now()}, indent=2).encode()

    def __str__(self) -> str:
        return f"the run of {self.user} in {self.host}:{self.directory}, which wrote it last at {self.at}"


def user_name() -> str:
    """Name of the user of this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in many containers
        return "unknown"


def refuse_other(held: Owner | None, own: Owner, where: str, empty: bool) -> None:
    """Raises UserError unless a run may write a mirror.

    It may if nobody else writes it. A run whose directory is empty may also take over what the same user has written
    from another directory: that one was lost, or it is told so when it next wants to write.

    Args:
        held: the owner of the mirror; None: nobody.
        own: the run.
        where: the mirror.
        empty: whether the run's directory has no checkpoint.
    """
    if held is None or held.id == own.id or (empty and held.user == own.user):
        return
    another = "set another --name or another checkpoint.mirror"
    if empty:
        remedy = f"{another} to start a run of your own, or remove {where}/{OWNER} to resume that one here"
    else:
        remedy = f"{another}, or remove {where} if nobody needs its checkpoints"
    raise UserError(f"checkpoint.mirror: {where} belongs to {held}; {remedy}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
