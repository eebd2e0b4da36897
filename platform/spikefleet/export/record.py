"""What a registered version says of its exports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikefleet.registry.mlflow_store import connect, resolve
from spikefleet.tracking.mlflow_client import resolve_tracking_uri

TAG = "spikefleet.export."
"""Prefix of the version's tags; the format follows. The value is JSON with SHA-256, size and comparison."""


def record_export(uri: str, form: str, record: Mapping[str, Any], runs_dir: Path) -> None:
    """Keeps hash and comparison of the latest export in a format with the version. Raises UserError."""
    with connect(resolve_tracking_uri(runs_dir)) as client:
        version = resolve(client, uri)
        client.set_model_version_tag(version.name, str(version.version), f"{TAG}{form}", json.dumps(record))
