"""Whether a retraining is worth its time: what changed since the champion was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikefleet.config.schema import Config, differences
from spikefleet.registry.version import RegisteredVersion
from spikefleet.versions import code_version

_SHOWN = 3


def reasons_to_train(
    base: RegisteredVersion,
    base_config: Mapping[str, Any],
    config: Config,
    data_hash: str,
    *,
    has_champion: bool,
    force: bool,
) -> list[str]:
    """What changed since a version was trained, in words; empty if nothing did.

    Args:
        base: the champion, or the version that takes its place where there is none.
        base_config: its dumped configuration.
        config: of the retraining.
        data_hash: content hash of the data that it would train on.
        has_champion: whether the model has a champion.
        force: retrain although nothing changed.
    """
    reasons = []
    held = base.tags.get("data_hash", "")
    if held != data_hash:
        reasons.append(f"the data changed: content hash {data_hash[:12]}, version {base.version} has {held[:12]}")
    changed = differences(base_config, config.dump())
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        reasons.append(f"the configuration changed: {'; '.join(changed[:_SHOWN])}{more}")
    code = code_version()
    if base.tags.get("code_version") != code:
        reasons.append(f"the code changed: {code}, version {base.version} has {base.tags.get('code_version', 'none')}")
    if not has_champion:
        reasons.append("there is no champion")
    if force:
        reasons.append("it was asked for (--force)")
    return reasons
