"""The table of tasks: what validation needs to know of each task, without importing its implementation.

To add a task, write its module (see `spikefleet.tasks.task.Task`) and add its line here, or call `register_task` from a
plugin.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikefleet.config.messages import did_you_mean


@dataclass(frozen=True)
class TaskEntry:
    """The properties of one task."""

    name: str
    implementation: str
    """`module:class` of its `Task`."""
    networks: str
    """The `task` of the model families that it trains."""
    transform: str
    """The kind of `data.transform` that builds its batches from images."""
    event_transform: str | None = None
    """The kind of `data.transform` that builds its batches from recordings of events; None for a task of images."""
    label_smoothing: bool = False
    """Whether its loss supports `train.label_smoothing`."""
    class_weights: bool = False
    """Whether its loss supports `train.class_weights`, and its training `data.sampling=balanced`."""
    side_branches: bool = False
    """Whether its loss supports the side branches of shortcut back-propagation."""
    cuda_graphs: bool = False
    """Whether its loss has the same tensors for each batch of a size and waits for none: what a CUDA graph needs."""
    answers: str = "plain data for each image"
    """What a served network of the task answers, in words."""

    @property
    def transforms(self) -> tuple[str, ...]:
        """The kinds of `data.transform` that build its batches."""
        return (self.transform,) if self.event_transform is None else (self.transform, self.event_transform)


_TABLE: dict[str, TaskEntry] = {
    entry.name: entry
    for entry in (
        TaskEntry(
            "classification",
            "spikefleet.tasks.classification:Classification",
            networks="classification",
            transform="image",
            event_transform="events",
            label_smoothing=True,
            class_weights=True,
            side_branches=True,
            cuda_graphs=True,
            answers="a probability for each class and image, in columns with the names of the classes",
        ),
        TaskEntry(
            "detection",
            "spikefleet.tasks.detection:Detection",
            networks="detection",
            transform="detection",
            event_transform="event_detection",
            answers="a list of objects for each image: name, score from 0 to 1, and box (x1 y1 x2 y2 in its pixels)",
        ),
    )
}


def register_task(entry: TaskEntry) -> None:
    """Registers a task of a plugin. Raises ValueError if another task has its name."""
    if _TABLE.setdefault(entry.name, entry) != entry:
        raise ValueError(f"task {entry.name!r} is already registered as {_TABLE[entry.name].implementation}")


def forget_task(name: str) -> None:
    """Unregisters a task; an unknown name is ignored."""
    _TABLE.pop(name, None)


def list_tasks() -> list[str]:
    """Names of all tasks."""
    return list(_TABLE)


def find_task(name: str) -> TaskEntry:
    """A task by its name. Raises ValueError with the nearest name, or all of them."""
    if name not in _TABLE:
        raise ValueError(did_you_mean(name, _TABLE, f"must be one of {', '.join(_TABLE)}"))
    return _TABLE[name]
