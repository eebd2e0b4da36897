"""Gradient norm, firing rate and relative step of each layer of a recipe at initialisation, or of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import interpolate
from torch.nn.utils import get_total_norm

from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.tasks import build_task
from spikefleet.training.checkpoints import Snapshot
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.optimizer import large_step, learning_rate, smaller_steps
from spikefleet.training.state import TrainingState
from spikefleet_models.gradient_flow import LARGEST_STEP, GradientFlow, LayerGradient, first_to_last, judge
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.messages import counted

_EVENTS = 0.2
"""Of each pixel, polarity and time step of noise: about as many as recordings of moving digits have."""

_PATCHES = 4
"""Of a side: a quarter of them have events, others in each frame. Frames that are alike but for pixels would differ by
nothing after several pools, and batch norm would magnify that."""


@dataclass(frozen=True)
class GradientCheck:
    """What one backward pass of the training's loss shows, in fp32."""

    layers: tuple[LayerGradient, ...]
    """In the order in which the network calls them."""
    first_to_last: float
    """Gradient norm of the first layer that feeds neurons over that of the last."""
    problem: str | None
    """Why the network will hardly train: what explodes or vanishes, and at which layer."""
    learning_rate: float
    """Of the relative steps: after warm-up, or of the checkpoint's step."""
    clipped_to: float
    """Factor that `train.clip_norm` puts on the gradient; the relative steps have it, the gradient norms do not."""
    step: int
    """Optimizer steps that the weights have had; 0 at initialisation."""
    remedy: str
    """What makes the steps of this training smaller."""

    @property
    def largest_step(self) -> LayerGradient:
        """The layer that a step changes most, relative to its weights."""
        return max(self.layers, key=lambda row: row.relative_step)

    @property
    def findings(self) -> list[str]:
        """What is wrong, in sentences; empty if nothing is."""
        found = [] if self.problem is None else [f"will hardly train: {self.problem}"]
        if bypassed := [row.layer for row in self.layers if row.gradient_norm == 0]:
            found.append(
                f"{counted(len(bypassed), 'layer')} without a gradient, the first of them {bypassed[0]}; those of "
                "blocks that start as the identity have one after the first step"
            )
        largest = self.largest_step
        if largest.relative_step > LARGEST_STEP:
            found.append(large_step(largest.layer, largest.relative_step, self.learning_rate, self.remedy))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = {**asdict(self), "findings": self.findings}
        del plain["remedy"]  # the findings have it
        return plain


def check_gradients(
    config: Config,
    batch: Batch,
    data: DataSummary,
    snapshot: Snapshot | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> GradientCheck:
    """Runs the loss of a training forward and backward once, on the CPU.

    Args:
        config: of the training, with side branches and loss as it has them.
        batch: a training batch; its size may differ from the training's.
        data: summary of the data.
        snapshot: weights and position of a checkpoint; None for the initial weights.
        weights: state dict of a trained network without a checkpoint, such as a registered version; instead of
            `snapshot`.

    Raises:
        UserError: the configuration does not fit the data.
    """
    group = ProcessGroup.single()
    steps_per_epoch = 1 if snapshot is None else int(snapshot.state["steps_per_epoch"])
    state = TrainingState(_in_this_process(config), group, data.content_hash, steps_per_epoch)
    rate, step = config.optim.lr, 0
    if snapshot is not None:
        state.load(snapshot)
        step = state.step
        last = max(step - 1 - state.first_step, 0)
        rate = learning_rate(config.optim, last, steps_per_epoch, state.scheduled_epochs)
    if weights is not None:
        state.network.load_state_dict(dict(weights))
    state.train_mode()
    network = state.train_model
    with GradientFlow(state.network) as flow:
        values = build_task(config, data).loss(network, batch, state.balance)
        loss = values["loss"] / values["divisor"].clamp_min(1) if "divisor" in values else values["loss"]
        (loss * config.train.global_batch if config.train.loss == "sum" else loss).backward()
    total = float(get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))
    clip = config.train.clip_norm
    factor = clip / total if clip is not None and total > clip else 1.0
    adaptive = config.optim.kind == "adamw"  # clipping does not change the length of its steps
    layers = tuple(flow.layers(rate if adaptive else rate * factor, adaptive))
    trunk = config.model.trunk
    ratio, problem = first_to_last(layers, trunk), judge(layers, trunk)
    return GradientCheck(layers, ratio, problem, rate, factor, step, smaller_steps(config.optim, clip))


def _in_this_process(config: Config) -> Config:
    train = config.train.model_copy(update={"precision": "fp32", "compile": False, "sync_bn": False})
    return config.model_copy(update={"train": train})


def training_batch(config: Config, store: Store, images: int, epoch: int = 0) -> Batch:
    """The first images of an epoch, augmented as the training augments them.

    Raises:
        UserError: the transform does not fit the images.
    """
    split = store.samples("train")
    seed, size = config.train.seed, min(images, len(split))
    try:
        loader = BatchLoader(split, config.transform, train=True, seed=seed, epochs=config.train.epochs)
    except ValueError as error:
        raise UserError(f"the configuration does not fit the data: {error}") from error
    return next(loader.epoch(EpochPlan(samples=len(split), global_batch=size, seed=seed), epoch))


def noise_batch(config: Config, images: int, side: int) -> tuple[Batch, DataSummary]:
    """Images of normal noise, or frames of a few random events, with random targets, and the summary of such data.

    Args:
        config: of the training.
        images: number of images.
        side: height and width of the images in pixels.

    Raises:
        UserError: the task has no random targets, or the sides do not fit the network.
    """
    model = config.model
    if side % model.input_multiple:
        raise UserError(f"images of {side} pixels: the sides must be multiples of {model.input_multiple}")
    generator = torch.Generator().manual_seed(config.train.seed)
    shape = model.in_channels, side, side
    if config.data.transform.reads_events:
        drawn = torch.rand(images * model.simulated_timesteps, shape[0], _PATCHES, _PATCHES, generator=generator)
        rates = interpolate((drawn < 0.25) * 4 * _EVENTS, shape[1:], mode="nearest")
        pixels = torch.poisson(rates, generator=generator).unflatten(0, (images, -1))
    else:
        pixels = torch.randn(images, *shape, generator=generator)
    classes = tuple(map(str, range(model.num_classes)))
    data = DataSummary("noise", "", classes, tuple(range(model.num_classes)), shape)
    targets = build_task(config, data).random_targets(pixels, generator)
    return Batch(pixels, targets, torch.arange(images), images), data
