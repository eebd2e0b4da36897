"""What a training takes from a configuration and a store: the task, the loaders of the splits, the sampling plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.tasks import AnyTask, build_task
from spikefleet.training.distributed import ProcessGroup
from spikefleet_pipelines.class_balance import ClassBalance
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.stream_plan import EventStreamPlan
from spikefleet_tune.messages import counted

if TYPE_CHECKING:
    from spikefleet_pipelines.store.reader import Store


TrainingPlan = EpochPlan | EventStreamPlan


@dataclass(frozen=True)
class Splits:
    """The loaders of the splits."""

    train: BatchLoader
    val: BatchLoader | None
    """None where all images are trained on."""
    test: BatchLoader
    """Its split is "val" where the data have no other images to report on."""

    @classmethod
    def of(cls, store: Store, config: Config, group: ProcessGroup) -> Splits:
        """The loaders of a store. Raises ValueError if the transform does not fit its images."""
        manifest = store.manifest

        def loader(split: str) -> BatchLoader:
            return BatchLoader(
                store.samples(split),
                config.transform,
                train=False,
                seed=config.train.seed,
                processes=config.data.loader_processes,
                pin_memory=group.device.type == "cuda",
                epochs=config.train.epochs,
                device=group.device,
            )

        val = loader("val") if "val" in manifest.splits else None
        train = training_loader(
            store, config, group.device, config.data.loader_processes, pin_memory=group.device.type == "cuda"
        )
        return cls(train, val, loader(manifest.original("test")))


def training_loader(
    store: Store, config: Config, device: torch.device | str = "cpu", processes: int = 0, pin_memory: bool = False
) -> BatchLoader:
    """The loader of the training split: of its samples, or of the windows of its recordings.

    Args:
        store: of the data.
        config: of the run.
        device: of the training, where events are counted; a GPU normalises images too, and with `augment_on=device` any
            device augments and normalises them.
        processes: loader processes.
        pin_memory: put batches in page-locked memory.

    Raises:
        ValueError: the transform does not fit.
    """
    samples, stream = store.samples("train"), config.train.stream
    on_device = torch.device(device).type == "cuda" or config.transform.augments_on_device
    loader: type[BatchLoader] = BatchLoader
    extra: dict[str, bool] = {"pixels": True} if on_device and stream is None else {}
    if stream is not None:
        from spikefleet_pipelines.streams import StreamLoader, StreamSamples, recordings_of  # with pyarrow

        window_us = config.transform.stream_window_us()
        loader, samples = StreamLoader, StreamSamples(recordings_of(samples), window_us, stream.labelled)
    return loader(
        samples,
        config.transform,
        train=True,
        seed=config.train.seed,
        processes=processes,
        pin_memory=pin_memory,
        epochs=config.train.epochs,
        device=device,
        **extra,
    )


def prepare_parts(config: Config, store: Store, group: ProcessGroup) -> tuple[AnyTask, Splits, TrainingPlan]:
    """Task, loaders and sampling plan of a training. Raises UserError if the configuration does not fit the data."""
    data = DataSummary.of(store.manifest)
    task = build_task(config, data, store.manifest.audit.images_per_class.get("train"))
    _refuse_splits_without_objects(store)
    shape = data.input_shape(config.data.transform)
    channels = shape[0] if shape else 3
    if config.model.in_channels != channels:
        what = "frames of the events" if data.sensor else "images"
        raise UserError(
            f"model.in_channels={config.model.in_channels}, but the {what} have {counted(channels, 'channel')}; "
            f"set model.in_channels={channels}"
        )
    try:
        splits = Splits.of(store, config, group)
        plan = _training_plan(config, splits.train, group)
    except ValueError as error:
        raise UserError(f"the configuration does not fit the data: {error}") from error
    if config.train.patience is not None and splits.val is None:
        raise UserError(
            f"train.patience={config.train.patience} needs a validation split, which the data do not have; leave it "
            "out, "
            "or hold images out (data.options.holdout)"
        )
    return task, splits, plan


def _training_plan(config: Config, loader: BatchLoader, group: ProcessGroup) -> TrainingPlan:
    train = config.train
    if train.stream is not None:
        from spikefleet_pipelines.streams import StreamLoader

        assert isinstance(loader, StreamLoader)
        return EventStreamPlan(
            windows=loader.split.windows,
            lanes=train.global_batch,
            world_size=group.size,
            rank=group.rank,
            seed=train.seed,
            mix=train.stream.mix,
        )
    training = config.transform.training_rows(loader.split)
    if config.data.sampling == "balanced":
        training = training._replace(balance=ClassBalance(loader.split.labels, train.seed))
    return EpochPlan(
        samples=len(loader.split),
        global_batch=train.global_batch,
        world_size=group.size,
        rank=group.rank,
        largest_world=config.cluster.most_workers if config.cluster.elastic else None,
        seed=train.seed,
        accumulate=train.accumulate,
        drop_partial=train.partial_batch == "drop",
        training=training,
    )


def _refuse_splits_without_objects(store: Store) -> None:
    """Detection metrics need objects; check before the first epoch."""
    boxes = store.manifest.audit.boxes or {}
    for name in ("val", "test"):
        if name in boxes and not sum(boxes[name].objects_per_class):
            raise UserError(f"split {name!r} of {store.location} has no object to measure; prepare another split")
