"""The configuration of a run: typed, frozen, validated as a whole before anything starts.

The component that a section configures owns the section.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from spikefleet.config.cluster_config import ClusterConfig
from spikefleet.config.init_config import InitConfig
from spikefleet.config.messages import PLAIN_NAME
from spikefleet.config.optim_config import OptimConfig
from spikefleet.config.renamed import with_current_keys
from spikefleet.config.retrain_config import RetrainConfig
from spikefleet.config.run_config import EvaluationConfig, RegistryConfig, TrackingConfig
from spikefleet.config.section import Section
from spikefleet.config.task_table import find_task
from spikefleet.config.train_config import TrainConfig
from spikefleet.config.worker_count import nearest_batches
from spikefleet_models.families import AnyModelConfig
from spikefleet_models.shortcut_config import ShortcutConfig
from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.sources.registry import find_source
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_tune.messages import counted


class CheckpointConfig(Section):
    """When checkpoints are saved, and which are kept."""

    every_epochs: int = Field(1, ge=1, description="epochs between two checkpoints")
    every_steps: int | None = Field(
        None, ge=1, description="steps between two checkpoints inside an epoch; default: none"
    )
    mirror: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9+.-]*://[^@]*$",
        description="URI of pyarrow.fs (s3://, gs://, file://) to which checkpoints and report are copied, below the "
        "run's name; a run whose directory is empty resumes from there",
    )
    keep_last: int = Field(2, ge=1, description="newest checkpoints to keep besides the best one")
    metric: str = Field("top1", description="validation metric that selects the best checkpoint")
    mode: Literal["max", "min"] = Field("max", description="whether the metric is maximised or minimised")


class Config(Section):
    """The configuration of one training run."""

    recipe: str = Field(pattern=PLAIN_NAME, description="name of the recipe")
    task: str = Field("classification", description="name of the task that the network is trained for")
    model: AnyModelConfig
    data: DataConfig
    init: InitConfig = InitConfig()
    train: TrainConfig
    optim: OptimConfig
    shortcut: ShortcutConfig = ShortcutConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()
    retrain: RetrainConfig = RetrainConfig()

    @field_validator("task")
    @classmethod
    def _task_is_known(cls, name: str) -> str:
        return find_task(name).name

    @model_validator(mode="after")
    def _task_suits_model_and_data(self) -> Self:
        task = find_task(self.task)
        if (can := self.model.task) != task.networks:
            raise ValueError(f"task={self.task}, but model.family={self.model.family} supports {can}; set task={can}")
        if self.data.transform.kind not in task.transforms:
            raise ValueError(
                f"task={self.task}: expected data.transform.kind={' or '.join(task.transforms)}, found "
                f"{self.data.transform.kind}"
            )
        source = find_source(self.data.source)
        if source.events != self.data.transform.reads_events and task.event_transform is not None:
            kind = task.event_transform if source.events else task.transform
            raise ValueError(
                f"data.source={source.name} has {'recordings of events' if source.events else 'images'}, but "
                f"data.transform.kind is {self.data.transform.kind}; set data.transform.kind={kind}"
            )
        if self.data.transform.drops_steps and self.model.needs_all_timesteps:
            raise ValueError(
                "data.transform.keep_fill=drop leaves slices out in training, but the network has weights for each of "
                f"model.timesteps={self.model.timesteps}; set data.transform.keep_fill=zero, or model.decoder=rate"
            )
        needed, sides = self.model.input_multiple, self.data.transform.side_multiple
        if sides % needed:
            raise ValueError(
                f"data.transform.divisor={sides} must be a multiple of the network's largest stride {needed}; "
                f"set data.transform.divisor={needed} and an image size that is a multiple of it"
            )
        if self.shortcut.enabled and not task.side_branches:
            raise ValueError(
                f"shortcut.where={self.shortcut.where}: side branches need task=classification, found {self.task}; "
                "set shortcut.where=none"
            )
        if self.shortcut.enabled:
            try:
                self.model.branch_channels(self.shortcut)
            except ValueError as error:
                raise ValueError(f"shortcut.{error}") from None
        if self.train.label_smoothing and not task.label_smoothing:
            raise ValueError(
                f"train.label_smoothing={self.train.label_smoothing} has no effect for task={self.task}; leave it out"
            )
        for field, value, without in (
            ("train.class_weights", self.train.class_weights, "none"),
            ("data.sampling", self.data.sampling, "every"),
        ):
            if value != without and not task.class_weights:
                raise ValueError(f"{field}={value} has no effect for task={self.task}; leave it out")
        most, plain = self.evaluation.max_detections, self.model.model_dump().get("criterion") or {}
        if most != EvaluationConfig().max_detections:
            if task.networks != "detection":
                raise ValueError(f"evaluation.max_detections={most} has no effect for task={self.task}; leave it out")
            if most > plain.get("max_detections", most):
                raise ValueError(
                    f"evaluation.max_detections={most}, but the network gives at most "
                    f"model.criterion.max_detections={plain['max_detections']}; set that to {most} too"
                )
        if self.train.ema_ramp is not None and self.train.ema_decay is None:
            raise ValueError(
                f"train.ema_ramp={self.train.ema_ramp} has no effect without train.ema_decay; set both or neither"
            )
        return self

    @model_validator(mode="after")
    def _streams_are_whole(self) -> Self:
        if self.train.stream is not None:
            hindrances = {
                f"train.accumulate={self.train.accumulate}": self.train.accumulate > 1,
                "train.compile=true": self.train.compile,
                "train.cuda_graphs=true": self.train.cuda_graphs,
                f"train.partial_batch={self.train.partial_batch}": self.train.partial_batch != "keep",
                f"shortcut.where={self.shortcut.where}": self.shortcut.enabled,
                f"data.sampling={self.data.sampling}": self.data.sampling != "every",
            }
            is_detection = find_task(self.task).networks == "detection"
            self.train.stream.check(
                self.data.transform, [field for field, there in hindrances.items() if there], is_detection
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        batch, cluster, accumulate = self.train.global_batch, self.cluster, self.train.accumulate
        near = nearest_batches(batch, cluster.least_workers, cluster.most_workers, accumulate)
        if near != [batch]:
            remedy = f"set it to {' or '.join(map(str, near))}" if near else "set a narrower range of cluster.workers"
            raise ValueError(
                f"train.global_batch={batch} cannot be divided by {cluster.shown_workers()} x "
                f"{counted(accumulate, 'micro-batch', 'micro-batches')}; {remedy}"
            )
        return self

    @model_validator(mode="after")
    def _sync_bn_has_gpus(self) -> Self:
        if self.train.sync_bn and not self.cluster.gpu:
            raise ValueError("train.sync_bn=true needs GPUs; add --gpu, or set train.sync_bn=false")
        return self

    @model_validator(mode="after")
    def _stages_can_be_recomputed(self) -> Self:
        asked, there = self.train.recompute, self.model.stage_count
        if asked > there:
            has = f"only {counted(there, 'stage')}" if there else "no stages"
            remedy = f"set at most {there}" if there else "set train.recompute=0"
            raise ValueError(f"train.recompute={asked}, but family={self.model.family} has {has}; {remedy}")
        if asked and self.train.sync_bn:
            raise ValueError(
                f"train.recompute={asked} cannot be combined with train.sync_bn=true, whose statistics would be "
                "exchanged a second time; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _graphs_can_be_captured(self) -> Self:
        if not self.train.cuda_graphs:
            return self
        reason = None
        if not find_task(self.task).cuda_graphs:
            reason = f"needs losses of fixed shapes, which task={self.task} has not"
        elif not self.cluster.gpu:
            reason = "needs a GPU; add --gpu"
        elif self.cluster.most_workers > 1:
            reason = f"is for one worker, found cluster.workers={self.cluster.workers}; set it to 1"
        elif self.train.precision == "fp16":
            reason = "does not support train.precision=fp16, whose loss scale changes; set it to bf16"
        if reason is not None:
            raise ValueError(f"train.cuda_graphs=true {reason}, or set train.cuda_graphs=false")
        return self

    @property
    def transform(self) -> BatchTransformConfig:
        """`data.transform` for the time steps that the network runs."""
        return self.data.transform.for_timesteps(self.model.simulated_timesteps)

    def registered_name(self, dataset: str) -> str:
        """Name of the registered model.

        Args:
            dataset: name of the data set that the network is trained on.
        """
        written_for = self.registry.dataset
        if self.registry.name is None and written_for is not None and dataset != written_for:
            return f"{self.model.family}_{dataset}"
        return self.registry.name or self.registry.default_name or self.recipe

    def dump(self) -> dict[str, Any]:
        """Plain data for JSON or YAML; `Config.model_validate` reads it back."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """SHA-256 over all fields that affect the result of training."""
        return hashlib.sha256(json.dumps(_identity(self.dump()), sort_keys=True).encode()).hexdigest()


# Fields that may differ when a run is resumed: none of them changes a bit of the result.
_NOT_IDENTITY = (
    "init",
    "train.max_minutes",
    "train.spike_bits",
    "train.recompute",
    "tracking.experiment",
    "tracking.every_steps",
    "registry",
    "retrain",
    "cluster.max_failures",
    "cluster.grace_s",
    "cluster.grow_after_s",
    "cluster.wait_minutes",
    "cluster.autoscaling",
    "checkpoint.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.mirror",
    "data.root",
    "data.store",
    "data.check_content",
    "data.loader_processes",
    "data.transform.bin_on",
    "data.transform.augment_on",
)


# Fields that older runs do not have, with the values of no effect: left out there, so that those runs keep their names.
_ABSENT_IF: Mapping[str, object] = {
    "train.freeze": [],
    "train.patience": None,
    "train.min_delta": 0,
    "train.segment": None,
    "train.class_weights": "none",
    "optim.lr_factors": {},
    "optim.kind": "sgd",
    "optim.beta2": 0.999,
    "data.sampling": "every",
    "data.transform.mixup": 0,
    "data.transform.mixup_alpha": 0.2,
    "data.transform.cut_mix": 0,
}


def _identity(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in _NOT_IDENTITY or (path in _ABSENT_IF and value == _ABSENT_IF[path]):
            continue
        kept[key] = _identity(value, f"{path}.") if isinstance(value, Mapping) else value
    return kept


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Compares two dumped configurations, in the fields that affect the result of training.

    Args:
        saved: of a run, maybe written by an earlier version.
        given: of this version.

    Returns:
        For each field that differs `PATH: expected SAVED, found GIVEN`.
    """
    return [
        f"{path}: expected {before!s}, found {now!s}" for path, (before, now) in differing_fields(saved, given).items()
    ]


def differing_fields(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields that affect the result of training in which two dumped configurations differ, with both values.

    Args:
        saved: of a run, maybe written by an earlier version.
        given: likewise.

    Returns:
        Both values by dotted path, in the order of the paths; "no value" where one has no such field.
    """
    left, right = (dict(leaves(_identity(without_unused_branches(_completed(tree))))) for tree in (saved, given))
    pairs = {path: (left.get(path, "no value"), right.get(path, "no value")) for path in sorted({*left, *right})}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def without_unused_branches(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A dumped configuration without the fields of side branches where it has none: they have no effect there."""
    shortcut = tree.get("shortcut")
    unused = isinstance(shortcut, Mapping) and shortcut.get("where") == "none"
    return {**tree, "shortcut": {"where": "none"}} if unused else tree


def _completed(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration of an earlier version with current keys, and with defaults for fields that it did not have."""
    current = with_current_keys(saved)
    try:
        return Config.model_validate(current).dump()
    except ValidationError:
        return current


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterates over the dotted keys and values of a dumped configuration."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
