"""The configuration of a run: typed, frozen, checked as a whole before anything starts.

Each section is owned by the component it configures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spikefleet.config.task_table import find_task
from spikefleet_models.families import AnyModelConfig
from spikefleet_models.shortcut_config import ShortcutConfig
from spikefleet_pipelines.data_config import DataConfig

_PLAIN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrainConfig(Section):
    """How long, how much at once and in which arithmetic."""

    epochs: int = Field(ge=1, description="passes over the training split")
    global_batch: int = Field(ge=1, description="samples in one optimizer step, over all workers")
    accumulate: int = Field(1, ge=1, description="micro-batches that a worker sums up before one optimizer step")
    eval_batch: int = Field(256, ge=1, description="samples in one evaluation batch of one worker")
    evaluate_every: int = Field(1, ge=1, description="epochs between evaluations on the validation split")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initialisation, sample order and augmentation")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type; membranes stay fp32")
    channels_last: bool = Field(False, description="NHWC memory layout")
    compile: bool = Field(False, description="torch.compile the network")
    sync_bn: bool = Field(False, description="batch normalisation over all workers (CUDA only)")
    deterministic: bool = Field(False, description="refuse kernels that do not give the same bits twice")
    clip_norm: float | None = Field(None, gt=0, description="largest L2 norm of the whole gradient")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the exponential moving average of weights")
    ema_ramp: float | None = Field(
        None,
        gt=0,
        description="steps over which that decay grows: decay * (1 - exp(-step / ramp)); null: from the start",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="classification only")
    loss: Literal["mean", "sum"] = Field(
        "mean", description="over the samples of a global batch; sum makes the rate depend on the batch (SpikeYOLO)"
    )
    loss_divisor: Literal["global", "rank"] = Field(
        "global",
        description="detection: what the loss is divided by is counted over the global batch, so that the number of "
        "workers changes nothing; or over each rank's part of it, as released code does",
    )


class OptimConfig(Section):
    """SGD with momentum and a learning rate that is a pure function of the position in training."""

    lr: float = Field(gt=0, description="learning rate after warm-up, for the global batch")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)
    decay_norm_and_bias: bool = Field(True, description="weight decay on batch-norm, gate and bias parameters too")
    schedule: Literal["constant", "step", "cosine", "linear"] = "cosine"
    milestones: tuple[int, ...] = Field((), description="epochs at which `step` multiplies the rate by gamma")
    gamma: float = Field(0.1, gt=0, le=1)
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear growth from zero")
    warmup_bias_lr: float | None = Field(None, ge=0, description="biases start warm-up from this rate instead of zero")
    warmup_momentum: float | None = Field(None, ge=0, lt=1, description="momentum grows from this during warm-up")
    final_factor: float = Field(0.0, ge=0, le=1, description="last learning rate / lr, for cosine and linear")

    @model_validator(mode="after")
    def _warm_up_is_there(self) -> Self:
        for name in ("warmup_bias_lr", "warmup_momentum"):
            if getattr(self, name) is not None and not self.warmup_epochs:
                raise ValueError(f"{name}={getattr(self, name)} has no effect without warmup_epochs")
        return self

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> Self:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule=step needs milestones, for example optim.milestones=[100,150]")
        if self.schedule != "step" and self.milestones:
            raise ValueError(f"milestones={list(self.milestones)} have no effect with schedule={self.schedule}")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be growing epochs from 1 on")
        return self


class ClusterConfig(Section):
    """Where it runs. Workers see other samples together in batch norm, and threads add up in another order."""

    workers: int = Field(1, ge=0, description="Ray Train workers; 0 trains in this process, without Ray")
    gpu: bool = Field(False, description="one GPU for each worker")
    cpus_per_worker: float = Field(1, gt=0)
    max_failures: int = Field(3, ge=-1, description="restarts after a worker's death; -1 for no limit")


class CheckpointConfig(Section):
    """When state is saved, and what is kept of it."""

    every_epochs: int = Field(1, ge=1)
    every_steps: int | None = Field(None, ge=1, description="also within an epoch")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept besides the best one")
    metric: str = Field("top1", description="validation metric that decides which checkpoint is the best")
    mode: Literal["max", "min"] = "max"


class TrackingConfig(Section):
    """What goes to MLflow, and how often."""

    experiment: str | None = Field(None, description="MLflow experiment; the recipe's name if not given")
    every_steps: int = Field(10, ge=1, description="steps between two rows of step metrics")
    health_every_steps: int = Field(50, ge=1, description="steps between two measurements of firing rates")


class RegistryConfig(Section):
    """Under which name the best checkpoint is registered."""

    register_best: bool = True
    name: str | None = Field(None, pattern=_PLAIN_NAME, description="registered model; the recipe's name if not given")


class Config(Section):
    """One training run."""

    recipe: str = Field(pattern=_PLAIN_NAME, description="name of the recipe")
    task: str = Field("classification", description="what the network is trained for: a name of the table of tasks")
    model: AnyModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    shortcut: ShortcutConfig = ShortcutConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()

    @field_validator("task")
    @classmethod
    def _task_is_known(cls, name: str) -> str:
        return find_task(name).name

    @model_validator(mode="after")
    def _task_suits_model_and_data(self) -> Self:
        task = find_task(self.task)
        if (can := self.model.task) != task.networks:
            raise ValueError(f"task={self.task}, but model.family={self.model.family} is for {can}; set task={can}")
        if self.data.transform.kind != task.transform:
            raise ValueError(
                f"task={self.task} needs data.transform.kind={task.transform}; the data section has "
                f"{self.data.transform.kind}"
            )
        needed, sides = self.model.input_multiple, self.data.transform.side_multiple
        if sides % needed:
            raise ValueError(
                f"data.transform.divisor={sides} is no multiple of the network's coarsest stride {needed}; "
                f"set data.transform.divisor={needed} and a size that it divides"
            )
        if self.shortcut.enabled and not task.side_branches:
            raise ValueError(
                f"shortcut.where={self.shortcut.where}: side branches classify, and the task is {self.task}; "
                "set shortcut.where=none"
            )
        if self.shortcut.enabled:
            try:
                self.model.branch_channels(self.shortcut)
            except ValueError as error:
                raise ValueError(f"shortcut.{error}") from None
        if self.train.label_smoothing and not task.label_smoothing:
            raise ValueError(
                f"train.label_smoothing={self.train.label_smoothing} has no meaning for task={self.task}; leave it out"
            )
        if self.train.ema_ramp is not None and self.train.ema_decay is None:
            raise ValueError(f"train.ema_ramp={self.train.ema_ramp} has no effect without train.ema_decay")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        parts = max(1, self.cluster.workers) * self.train.accumulate
        if self.train.global_batch % parts:
            below = self.train.global_batch // parts * parts
            near = [n for n in (below, below + parts) if n]
            raise ValueError(
                f"train.global_batch={self.train.global_batch} cannot be divided by {max(1, self.cluster.workers)} "
                f"workers x {self.train.accumulate} micro-batches; the nearest that can: {' or '.join(map(str, near))}"
            )
        return self

    @model_validator(mode="after")
    def _sync_bn_has_gpus(self) -> Self:
        if self.train.sync_bn and not self.cluster.gpu:
            raise ValueError("train.sync_bn=true needs GPUs (torch has it for CUDA only); add --gpu or leave it out")
        return self

    @property
    def registered_name(self) -> str:
        return self.registry.name or self.recipe

    def dump(self) -> dict[str, Any]:
        """Plain data that JSON and YAML can hold; `Config.model_validate` reads it back."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Hash of all that decides what is learnt."""
        return hashlib.sha256(json.dumps(_identity(self.dump()), sort_keys=True).encode()).hexdigest()


# What may differ between a run and its resumption: none of it changes a single bit of the result.
_NOT_IDENTITY = (
    "tracking.experiment",
    "tracking.every_steps",
    "registry",
    "cluster.max_failures",
    "checkpoint.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "data.root",
    "data.store",
    "data.loader_processes",
)


def _identity(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in _NOT_IDENTITY:
            continue
        kept[key] = _identity(value, f"{path}.") if isinstance(value, Mapping) else value
    return kept


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Field-by-field differences of two dumped configurations, of the fields that decide what is learnt."""
    left, right = dict(leaves(_identity(_completed(saved)))), dict(leaves(_identity(wanted)))
    return [
        f"{path}: {left.get(path, 'absent')!s} in the run, {right.get(path, 'absent')!s} asked for"
        for path in sorted(left.keys() | right.keys())
        if left.get(path, "absent") != right.get(path, "absent")
    ]


def _completed(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration that an earlier version wrote, with this version's defaults for fields that it did not have."""
    try:
        return Config.model_validate(saved).dump()
    except ValidationError:
        return saved


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a dumped configuration."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
