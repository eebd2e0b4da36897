"""Training steps without a store: states, tasks and batches of drawn images, for a classifier and two detectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.tasks.classification import Classification
from spikefleet.tasks.detection import Detection
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.state import TrainingState
from spikefleet_pipelines.loading import Batch
from spikefleet_pipelines.store.annotations import Placement, Target

STEPS = 4
CLASSIFIER = ["digits", "model.stages=[1]", "model.width=0.125", "model.timesteps=2", "model.asd_channel_reduction=4"]
DETECTOR = ["scenes_spike_yolo", "model.num_classes=3"]
RETINANET = ["scenes_retinanet", "model.num_classes=3", "model.backbone.timesteps=2", "model.fpn_channels=16"]
_SETTINGS = ("optim.fused=true", "tracking.every_steps=1", "tracking.health_every_steps=1000", "train.ema_decay=0.9")


def training_state(words: Sequence[str], device: torch.device) -> TrainingState:
    """The state of a training by a recipe with overrides, of one process."""
    config = load_config(words[0], parse_overrides([*words[1:], *_SETTINGS]))
    return TrainingState(config, ProcessGroup(0, 1, device), "0" * 64, STEPS)


def task_of(state: TrainingState) -> Any:
    """The task of a state, of which losses are all that is asked; a detector's on all anchors."""
    if state.config.task == "classification":
        return Classification([str(digit) for digit in range(10)])
    criterion: Any = state.config.model.build_criterion()
    criterion.dense = True
    task = object.__new__(Detection)
    task._criterion, task._global_divisor = criterion, True
    return task


def random_batches(words: Sequence[str]) -> Iterator[Batch]:
    """Batches for the steps of an epoch, the same each time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        if words[0] == "digits":
            images = torch.rand(4, 1, 8, 8, generator=generator)
            targets: Any = torch.randint(10, (4,), generator=generator)
        else:
            images = torch.rand(2, 3, 64, 64, generator=generator)
            boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 10.0, 60.0, 30.0]])
            placement = Placement(1.0, 1.0, 0.0, 0.0, 64, 64)
            targets = (
                Target(boxes, torch.tensor([0, 2]), placement, None),
                Target(boxes[:0], torch.tensor([], dtype=torch.int64), placement, None),
            )
        yield Batch(images, targets, torch.arange(len(images)), len(images))
