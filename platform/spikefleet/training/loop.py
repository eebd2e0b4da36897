"""The one training core. Ray Train workers, a one-worker trial and `--workers 0` all call `train`.

Data-parallel back-propagation through time: each worker runs all T steps on its slice of the global batch, DDP averages
the gradients. The mean over the global batch is exact whatever the number of workers and however uneven the last batch.
(A detector's loss has divisors of its own, which are those of one worker's part of the batch, as in its paper's code.)
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spikefleet import plots
from spikefleet.config.schema import CheckpointConfig, Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import RunError, UserError
from spikefleet.tasks import AnyTask, build_task
from spikefleet.training.checkpoints import CheckpointFolder, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.evaluation import Evaluation, evaluate
from spikefleet.training.events import CheckpointSaved, EpochDone, EventSink, Note, Started
from spikefleet.training.malloc import keep_freed_memory
from spikefleet.training.state import TrainingState
from spikefleet.training.step import Meter, due, micro_batches, training_step
from spikefleet.versions import library_versions
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.store.reader import Store

_PICTURES = 32
_SHOWN_OF_BATCH = 16


BeforeStep = Callable[[ProcessGroup, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a finished training leaves behind."""

    steps: int
    best_checkpoint: str
    validation: Mapping[str, float]
    test: Mapping[str, float]
    history: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class Splits:
    """How a worker reads the three splits."""

    train: BatchLoader
    val: BatchLoader
    test: BatchLoader

    @classmethod
    def of(cls, store: Store, config: Config, group: ProcessGroup) -> Splits:
        def loader(split: str) -> BatchLoader:
            return BatchLoader(
                store.split(split),
                config.data.transform,
                train=split == "train",
                seed=config.train.seed,
                processes=config.data.loader_processes,
                pin_memory=group.device.type == "cuda",
                epochs=config.train.epochs,
            )

        return cls(loader("train"), loader("val"), loader("test"))


def train(
    config: Config,
    store: Store,
    run_dir: Path,
    group: ProcessGroup,
    sink: EventSink,
    before_step: BeforeStep | None = None,
) -> Outcome:
    """Trains from the latest committed checkpoint in `run_dir`, or from the start, to the end; then tests the best.

    `before_step(group, step)` is called before each optimizer step (fault injection, profiling).
    Raises NonFiniteError on all ranks together; UserError when the run in `run_dir` belongs to another configuration.
    """
    _set_arithmetic(config)
    if group.device.type == "cpu":
        keep_freed_memory()
    task, splits, plan = prepare_parts(config, store, group)
    state = TrainingState(config, group, store.manifest.content_hash, plan.steps_per_epoch)
    folder = CheckpointFolder(run_dir / "checkpoints")
    _resume(state, task, folder, sink)
    _settle_gradient_exchange(state, task, store, plan)
    if group.is_main and state.step == 0:
        _draw_first_batch(config, task, store, plan, run_dir / "report" / "training_batch.png")
    meter = Meter()
    for epoch in range(state.epoch, config.train.epochs):
        for batch in splits.train.epoch(plan, epoch, start_step=state.step_in_epoch):
            if before_step is not None:
                before_step(group, state.step)
            training_step(state, task, batch, meter, sink)
            if due(config.checkpoint.every_steps, state.step) and state.step_in_epoch < state.steps_per_epoch:
                _save(state, folder, sink)
        _finish_epoch(state, task, splits, folder, sink)
        meter.restart()
    return _test_best(state, task, splits, folder, run_dir, sink)


def prepare_parts(config: Config, store: Store, group: ProcessGroup) -> tuple[AnyTask, Splits, EpochPlan]:
    """Task, loaders and plan. Raises UserError when the configuration does not suit the data."""
    task = build_task(config, DataSummary.of(store.manifest))
    _refuse_splits_without_objects(store)
    shape = store.manifest.image_shape
    channels = shape[0] if shape else 3
    if config.model.in_channels != channels:
        raise UserError(f"model.in_channels={config.model.in_channels}, but the images have {channels} channels")
    try:
        splits = Splits.of(store, config, group)
        plan = EpochPlan(
            samples=len(splits.train.split),
            global_batch=config.train.global_batch,
            world_size=group.size,
            rank=group.rank,
            seed=config.train.seed,
            accumulate=config.train.accumulate,
        )
    except ValueError as error:
        raise UserError(f"the configuration does not suit the data: {error}") from error
    return task, splits, plan


def _refuse_splits_without_objects(store: Store) -> None:
    """They could not be measured, which else would be found out after the first epoch."""
    boxes = store.manifest.audit.boxes or {}
    for name in ("val", "test"):
        if name in boxes and not sum(boxes[name].objects_per_class):
            raise UserError(f"split {name!r} of {store.location} has no object, so nothing can be measured on it")


def _set_arithmetic(config: Config) -> None:
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic
    if torch.are_deterministic_algorithms_enabled() != config.train.deterministic:  # it imports torch's compiler: 2 s
        torch.use_deterministic_algorithms(config.train.deterministic)
    torch.backends.cudnn.benchmark = not config.train.deterministic


def _resume(state: TrainingState, task: AnyTask, folder: CheckpointFolder, sink: EventSink) -> None:
    """Every rank reads the checkpoint that rank 0 has picked."""
    if state.group.is_main:
        folder.clean()
    _refuse_unshared_storage(state.group, folder)
    latest = state.group.broadcast(folder.latest())
    if latest is not None:
        state.restore(load_checkpoint(latest))
        sink.emit(Note(f"going on from {latest.name} (epoch {state.epoch + 1}, step {state.step})"))
    parameters = sum(p.numel() for p in state.network.parameters())
    facts = {"parameters": parameters, "device": str(state.group.device), **library_versions()}
    epochs = state.config.train.epochs
    sink.emit(Started(state.step, epochs * state.steps_per_epoch, state.steps_per_epoch, epochs, facts, task.headline))


def _refuse_unshared_storage(group: ProcessGroup, folder: CheckpointFolder) -> None:
    """Each rank must see what rank 0 writes; all ranks raise together."""
    probe = folder.folder / f"partial-probe-{group.broadcast(uuid.uuid4().hex)}"
    try:
        if group.is_main:
            probe.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"{folder.folder} could not be written: {error}") from error
    group.broadcast(None)
    blind = [rank for rank, sees in enumerate(group.all_gather(probe.is_dir())) if not sees]
    if group.is_main:
        probe.rmdir()
    if blind:
        raise UserError(
            f"ranks {', '.join(map(str, blind))} do not see the run directory {folder.folder.parent}; "
            "give a --runs-dir that all nodes share"
        )


def _settle_gradient_exchange(state: TrainingState, task: AnyTask, store: Store, plan: EpochPlan) -> None:
    """Runs a step that is thrown away, so that a resumed run adds gradients up in the order of one never stopped.

    DDP arranges its buckets anew after the first backward, and with three or more ranks their arrangement decides in
    which order floating-point numbers are added.
    """
    group, config = state.group, state.config
    if group.size == 1:
        return
    batch = _first_batch(config, store, plan).to(group.device, config.train.channels_last)
    buffers = {name: buffer.clone() for name, buffer in state.network.named_buffers()}
    state.train_model.train()
    with torch.random.fork_rng(), state.autocast():
        values = task.loss(state.ddp_model, batch, state.balance)
    values["loss"].backward()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in state.network.named_buffers():
            buffer.copy_(buffers[name])


def _first_batch(config: Config, store: Store, plan: EpochPlan) -> Batch:
    """Its first part, by a loader of its own, so that those of the training start at their place."""
    transform, seed, epochs = config.data.transform, config.train.seed, config.train.epochs
    loader = BatchLoader(store.split("train"), transform, train=True, seed=seed, epochs=epochs)
    return next(micro_batches(next(loader.epoch(plan, epoch=0)), config.train.accumulate))


def _draw_first_batch(config: Config, task: AnyTask, store: Store, plan: EpochPlan, path: Path) -> None:
    """The first pictures that the network is trained on, as it sees them but for the normalisation."""
    batch = _first_batch(config, store, plan)
    shown = min(_SHOWN_OF_BATCH, len(batch.indices))
    normalise = config.data.transform.normalise
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (normalise.mean, normalise.std))
    pixels = ((batch.images[:shown] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    task.report.draw_batch(list(pixels), batch.targets[:shown], path)


def _finish_epoch(
    state: TrainingState, task: AnyTask, splits: Splits, folder: CheckpointFolder, sink: EventSink
) -> None:
    """Evaluates, moves the position to the next epoch, and saves when it is time to or when this is the best so far."""
    config = state.config
    row = {"epoch": float(state.epoch + 1)}
    row |= {f"train/{name}": total / len(splits.train.split) for name, total in state.sums.items()}
    if config.shortcut.enabled:
        row["balance_coefficient"] = state.balance
    gradients = _gradient_table(state)
    last = state.epoch + 1 == config.train.epochs
    evaluation: Evaluation[Any, Any] | None = None
    measured: dict[str, float] = {}
    if last or due(config.train.evaluate_every, state.epoch + 1):
        evaluation = _evaluate(state, task, splits.val)
        measured = state.group.broadcast(evaluation and task.metrics(evaluation.predictions, evaluation.targets))
        if config.checkpoint.metric not in measured:
            raise UserError(
                f"checkpoint.metric={config.checkpoint.metric} cannot be measured: nothing in the validation split is "
                f"of its kind; choose one of {', '.join(measured)}"
            )
        row |= {f"val/{name}": value for name, value in measured.items()}
    if evaluation is not None:
        row |= {f"spikes/{name}": value for name, value in evaluation.health.items()}
    state.epoch, state.step_in_epoch, state.sums = state.epoch + 1, 0, {}
    state.history.append(row)
    best = bool(measured) and _improves(config.checkpoint, state.best, measured)
    if best:
        state.best = {"step": state.step, "epoch": state.epoch, "metrics": measured}
    layers = () if evaluation is None else evaluation.layers
    sink.emit(EpochDone(state.epoch, state.step, row, best, layers, gradients))
    timely = due(config.checkpoint.every_epochs, state.epoch) or due(config.checkpoint.every_steps, state.step)
    if best or last or timely:
        _save(state, folder, sink)


def _evaluate(state: TrainingState, task: AnyTask, loader: BatchLoader) -> Evaluation[Any, Any] | None:
    state.group.broadcast_buffers(state.eval_model)
    return evaluate(state.eval_model, task, loader, state.config.train, state.group)


def _improves(config: CheckpointConfig, best: Mapping[str, Any] | None, measured: Mapping[str, float]) -> bool:
    if best is None:
        return True
    gain = measured[config.metric] - best["metrics"][config.metric]
    return gain > 0 if config.mode == "max" else gain < 0


def _gradient_table(state: TrainingState) -> tuple[dict[str, Any], ...]:
    """L2 norm of each parameter's gradient in the last step of the epoch."""
    if not state.group.is_main:
        return ()
    named = [(name, p.grad) for name, p in state.network.named_parameters() if p.grad is not None]
    norms = torch.stack([gradient.norm() for _, gradient in named]).tolist() if named else []
    return tuple({"parameter": name, "gradient_norm": norm} for (name, _), norm in zip(named, norms, strict=True))


def _save(state: TrainingState, folder: CheckpointFolder, sink: EventSink) -> None:
    snapshot = state.snapshot()
    if state.group.is_main:
        path = folder.save(state.step, snapshot)
        folder.prune(state.config.checkpoint.keep_last, {state.best["step"]} if state.best else set())
        sink.emit(CheckpointSaved(state.step, str(path)))


def _test_best(
    state: TrainingState, task: AnyTask, splits: Splits, folder: CheckpointFolder, run_dir: Path, sink: EventSink
) -> Outcome:
    """Loads the best checkpoint, measures it on the test split and writes the report of the run."""
    assert state.best is not None, "the last epoch is always evaluated"
    path = state.group.broadcast(folder.at(state.best["step"]))  # not before rank 0 has committed it
    state.load_weights(load_checkpoint(path))
    evaluation = _evaluate(state, task, splits.test)
    figures: dict[str, float] = {}
    if evaluation is not None:
        sink.emit(Note(f"testing {path.name}, the best of {state.config.checkpoint.metric} on the validation split"))
        details = task.details(evaluation.predictions, evaluation.targets)
        figures = details["metrics"]
        task.report.write(details, evaluation.predictions, evaluation.targets, run_dir / "report")
        pictures = min(_PICTURES, len(evaluation.targets))
        images = [splits.test.split.image(row) for row in range(pictures)]
        chart = run_dir / "report" / "predictions.png"
        task.report.draw(images, evaluation.predictions[:pictures], evaluation.targets[:pictures], chart)
        plots.learning_curve(state.history, state.config.checkpoint.metric, run_dir / "report" / "learning_curve.png")
    return Outcome(state.step, str(path), state.best["metrics"], state.group.broadcast(figures), tuple(state.history))
