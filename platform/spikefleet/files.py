"""JSON files and the hash by which files are known.

Every write is atomic and synced to disk (`spikefleet_tune.atomic`): a kill of the process, or a crash of the machine,
leaves the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from spikefleet.errors import UserError
from spikefleet_tune.atomic import write_atomically


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, atomically, with sorted keys."""
    write_atomically(path, json.dumps(data, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON. Raises UserError naming the file when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {str(error)[:200]}") from None


def read_json_object(path: Path, *needed: str) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError naming the file when it is none, or lacks one of the keys `needed`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds {json.dumps(content)[:40]}, and not an object")
    if lacking := [key for key in needed if key not in content]:
        raise UserError(f"{path} is damaged: it lacks {', '.join(lacking)}")
    return content
