"""The table of tasks: what a configuration needs to know of each, without importing what does the task.

To add a task: its module (see `spikefleet.tasks.task.Task`), and its line here, or `register_task` from a plugin.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikefleet.config.messages import did_you_mean


@dataclass(frozen=True)
class TaskEntry:
    """One task."""

    name: str
    implementation: str
    """`module:class` of its `Task`."""
    networks: str
    """Which networks it trains: the `task` that a model family declares."""
    transform: str
    """Kind of `data.transform` that gives its batches, and so which stores it reads."""
    label_smoothing: bool = False
    """Whether its loss knows `train.label_smoothing`."""
    side_branches: bool = False
    """Whether its loss knows the side branches of shortcut back-propagation."""


_TABLE: dict[str, TaskEntry] = {
    entry.name: entry
    for entry in (
        TaskEntry(
            "classification",
            "spikefleet.tasks.classification:Classification",
            networks="classification",
            transform="image",
            label_smoothing=True,
            side_branches=True,
        ),
        TaskEntry("detection", "spikefleet.tasks.detection:Detection", networks="detection", transform="detection"),
    )
}


def register_task(entry: TaskEntry) -> None:
    """Adds a task from outside of the package. Raises ValueError when another one has its name."""
    if _TABLE.setdefault(entry.name, entry) != entry:
        raise ValueError(f"task {entry.name!r} is registered already, as {_TABLE[entry.name].implementation}")


def forget_task(name: str) -> None:
    """Takes a registered task back."""
    _TABLE.pop(name, None)


def list_tasks() -> list[str]:
    """Names of all tasks."""
    return list(_TABLE)


def find_task(name: str) -> TaskEntry:
    """A task by its name. Raises ValueError naming the nearest, or all."""
    if name not in _TABLE:
        raise ValueError(did_you_mean(name, _TABLE, f"must be one of {', '.join(_TABLE)}"))
    return _TABLE[name]
