"""How much training a reproduction took so far, and about how much is left."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Protocol

from spikefleet.reproduction.results import Training
from spikefleet_tune.messages import counted


class Trainings(Protocol):
    """Trainings that are to be done, and those of them that are."""

    @property
    def wanted(self) -> Mapping[str, str]:
        """The setting of each training by digest; a setting is a training but for its seed."""

    @property
    def known(self) -> Mapping[str, Training]:
        """Finished trainings by digest."""


def time_line(groups: Iterable[Trainings]) -> str:
    """A line for the terminal: trainings done and left, with their time."""
    groups = list(groups)
    done = [group.known[digest] for group in groups for digest in group.wanted if digest in group.known]
    waiting = [setting for group in groups for digest, setting in group.wanted.items() if digest not in group.known]
    line = f"{len(done)} of {counted(len(done) + len(waiting), 'training')} done, in {words_of(_sum(done))} of training"
    if not waiting:
        return line
    left = seconds_left(done, waiting)
    about = "their time is not known yet" if left is None else f"about {words_of(left)}"
    return f"{line}; {len(waiting)} left, {about}"


def seconds_left(done: Iterable[Training], waiting: Iterable[str]) -> float | None:
    """About how long trainings take: as others of their setting did, else as all others on average.

    Args:
        done: finished trainings.
        waiting: the setting of each training that is left.

    Returns:
        Seconds of training, summed over trainings that may run at the same time; None if none is finished.
    """
    by_setting: dict[str, list[float]] = {}
    for training in done:
        by_setting.setdefault(training.setting, []).append(training.seconds)
    if not by_setting:
        return None
    mean = statistics.fmean(seconds for group in by_setting.values() for seconds in group)
    return sum(statistics.fmean(by_setting[one]) if one in by_setting else mean for one in waiting)


def _sum(done: Iterable[Training]) -> float:
    return sum(training.seconds for training in done)


def words_of(seconds: float) -> str:
    """A duration for people, such as `1 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
