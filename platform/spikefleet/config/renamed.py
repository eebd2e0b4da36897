"""Stored configurations of earlier versions: renamed keys, and fields whose default is not what was done without them.

Every stored `config.json` (of runs, checkpoints and registered packages) is read through `with_current_keys` before it
is validated. A recipe, an override or a search that still has an old key is refused, with the new one.

To rename a key: rename the field, and add a row here. A field that changes what a training computes keeps the earlier
behaviour for configurations that lack it: one of the `_keep_...` functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikefleet_models.families import DEFAULT_FAMILY

RENAMED_KEYS: dict[str, str] = {}
"""Dotted old key -> dotted new key, in the order of the renames; a key may be that of a whole section."""


def with_current_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration with the current names of renamed keys.

    Args:
        stored: plain data, as an earlier version wrote it; not modified.

    Returns:
        A copy. A key whose new name already exists stays, and validation refuses it.
    """
    tree = _copy(stored)
    for old, new in RENAMED_KEYS.items():
        *path, last = old.split(".")
        section = _section(tree, path)
        if section is None or last not in section:
            continue
        *new_path, new_last = new.split(".")
        target = _section(tree, new_path, create=True)
        if target is not None and new_last not in target:
            target[new_last] = section.pop(last)
    _keep_divisor(tree)
    _keep_gate_gradient(tree)
    _keep_gate_decay(tree)
    return tree


def _keep_gate_gradient(tree: dict[str, Any]) -> None:
    """Networks that lack `gate_gradient` were trained with the literal one, for ever."""
    family = (_section(tree, ["model"]) or {}).get("family", DEFAULT_FAMILY)
    path = {"sg_resnet": ["model"], "retinanet": ["model", "backbone"]}.get(str(family))
    network = None if path is None else _section(tree, path)
    if network is not None:
        network.setdefault("gate_gradient", "literal")


def _keep_gate_decay(tree: dict[str, Any]) -> None:
    """Runs that lack `optim.decay_gates` decayed W and B of BSG* with the norms and biases."""
    optim = _section(tree, ["optim"])
    if optim is not None and "decay_gates" not in optim:
        optim["decay_gates"] = optim.get("decay_norm_and_bias", True)


def _keep_divisor(tree: dict[str, Any]) -> None:
    """Detection runs that lack `train.loss_divisor` divided by each rank's own part of a micro-batch."""
    train, cluster = _section(tree, ["train"]), _section(tree, ["cluster"])
    if tree.get("task") == "detection" and train is not None and "loss_divisor" not in train:
        parts = (cluster or {}).get("workers", 1), train.get("accumulate", 1)
        if any(isinstance(count, int) and count > 1 for count in parts):
            train["loss_divisor"] = "rank"


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the sections; values that are not sections are shared."""
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _section(tree: dict[str, Any], path: list[str], create: bool = False) -> dict[str, Any] | None:
    """The section at a path; None if there is none, or a value is in its place."""
    node: Any = tree
    for part in path:
        node = node.setdefault(part, {}) if create else node.get(part)
        if not isinstance(node, dict):
            return None
    section: dict[str, Any] = node
    return section
