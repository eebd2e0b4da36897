"""Event sets of the simulated camera: events and processor time a sample, and a figure of one sample of each.

python tests/bench/bench_event_sets.py [--samples 128] [--figure strips.png]
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.saccade_scenes import BoxFrame, SaccadeScenes
from spikefleet_pipelines.events.saccades import Saccades
from spikefleet_pipelines.events.twins import ApparentMotion, FirstDigit
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions

EventSet = Saccades | FirstDigit | ApparentMotion | SaccadeScenes
_STEPS = 12


def measure(task: EventSet, samples: int) -> str:
    start = time.thread_time()
    found = [events for events, _ in task.samples("train", range(samples))]
    seconds = time.thread_time() - start
    counts = [len(events) for events in found]
    share = np.concatenate([events.p for events in found]).mean()
    return (
        f"| `{type(task).__name__}` | {task.sensor[1]}x{task.sensor[0]}, {task.duration_us // 1000} ms | "
        f"{sum(task.counts.values()):,} | {np.mean(counts):,.0f} ({min(counts):,} to {max(counts):,}) | {share:.3f} | "
        f"{1000 * seconds / samples:.1f} |"
    )


def frame(events: EventArrays, task: EventSet, step: int) -> NDArray[np.uint8]:
    """Colour the events of one of the steps: ON red, OFF blue, on white."""
    part = events.select(events.t * _STEPS // task.duration_us == step)
    counts = np.zeros((2, *task.sensor))
    np.add.at(counts, (part.p, part.y, part.x), 1)
    shown = np.ones((*task.sensor, 3))
    shown[..., 1:] -= np.minimum(counts[1] / 2, 1)[..., None]
    shown[..., :2] -= np.minimum(counts[0] / 2, 1)[..., None]
    return (255 * np.clip(shown, 0, 1)).astype(np.uint8)


def draw(tasks: list[EventSet], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(task, number) for task in tasks for number in ((0, 1) if hasattr(task, "part_us") else (3,))]
    figure, axes = pyplot.subplots(len(shown), _STEPS, figsize=(1.2 * _STEPS, 1.4 * len(shown)))
    for row, (task, number) in zip(axes, shown, strict=True):
        events, target = task.sample("train", number)
        for step, axis in enumerate(row):
            axis.imshow(frame(events, task, step), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            end = task.duration_us * (step + 1) // _STEPS
            axis.set_title(f"{end // 1000} ms", fontsize=7)
            if not isinstance(target, int):
                _draw_boxes(axis, target, end)
        label = task.class_names[target] if isinstance(target, int) else ""
        row[0].set_ylabel(f"{type(task).__name__}\n{label}", fontsize=7)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)


def _draw_boxes(axis: Axes, frames: list[BoxFrame], end: int) -> None:
    nearest = min(frames, key=lambda one: abs(one.t - end))
    for (x, y, width, height), label in zip(nearest.boxes.tolist(), nearest.labels.tolist(), strict=True):
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, color="green"))
        axis.text(x, y - 1, str(label), color="green", fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    digits = read_digits(None, DigitsOptions(), 0).splits
    tasks = [kind(digits) for kind in (Saccades, FirstDigit, ApparentMotion, SaccadeScenes)]
    print("| set | sensor | samples | events a sample | ON | ms a sample |\n|---|---|---|---|---|---|")
    for task in tasks:
        print(measure(task, options.samples))
    if options.figure:
        draw(tasks, options.figure)


if __name__ == "__main__":
    main()
