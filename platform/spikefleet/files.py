"""JSON files and file hashes.

Every write is atomic and synced to disk (`spikefleet_tune.atomic`): a kill or a crash leaves the old file or the new
one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from spikefleet.errors import UserError
from spikefleet_tune.atomic import write_atomically


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Writes JSON with sorted keys, atomically. Raises OSError."""
    write_atomically(path, json.dumps(data, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON. Raises UserError if the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {str(error)[:200]}") from None


def read_json_object(path: Path, *needed: str) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError if it is another value, or lacks one of the keys `needed`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: expected an object, found {json.dumps(content)[:40]}")
    if lacking := [key for key in needed if key not in content]:
        raise UserError(f"{path} is damaged: it has no {', '.join(lacking)}")
    return content
