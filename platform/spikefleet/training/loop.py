"""The training loop. Ray Train workers, one-worker trials and `--workers 0` all call `train`.

Data-parallel back-propagation through time (BPTT): each worker runs all T steps on its slice of the global batch, and
DDP averages the gradients. The mean over the global batch is exact for any number of workers and any size of the last
batch, whose weight `train.partial_batch` chooses. A detector's loss is divided by a count over the global batch
(`train.loss_divisor`), so the same holds for it.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikefleet import plots
from spikefleet.config.schema import CheckpointConfig, Config
from spikefleet.disks import disk_problem
from spikefleet.errors import RunError, UserError
from spikefleet.tasks import AnyTask
from spikefleet.tasks.per_image import save_per_image
from spikefleet.training.checkpoint_state import CheckpointState
from spikefleet.training.checkpoints import (
    INITIAL_WEIGHTS,
    CheckpointFolder,
    load_checkpoint,
    load_initial_weights,
)
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.early_stopping import stops_early
from spikefleet.training.ending import Ending, out_of_time, reason_to_end
from spikefleet.training.evaluation import Evaluation, EvaluationStopped, evaluate
from spikefleet.training.events import CheckpointSaved, EpochDone, EventSink, Note, Phase, Started
from spikefleet.training.malloc import keep_freed_memory
from spikefleet.training.mirror import mirrored
from spikefleet.training.prefetch import ahead
from spikefleet.training.splits import Splits, TrainingPlan, prepare_parts, training_loader
from spikefleet.training.state import TrainingState
from spikefleet.training.step import Meter, due, micro_batches, settle, training_step
from spikefleet.training.stopping import StopRequested, TrainingStopped, never
from spikefleet.training.threads import restored_thread_count, thread_counts
from spikefleet.training.unit_forms import settle_form
from spikefleet.versions import library_versions
from spikefleet_models.kernels import CpuForm
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EpochPlan

if TYPE_CHECKING:  # any store will do, also one in memory: `pyarrow` is not needed for training itself
    from spikefleet_pipelines.store.reader import Store

_IMAGES_OF_REPORT = 32
_IMAGES_OF_BATCH = 16

BeforeStep = Callable[[ProcessGroup, int], None]
"""Called on each rank before each optimizer step, with the steps done (fault injection, profiling)."""


@dataclass(frozen=True)
class Outcome:
    """The result of a finished training."""

    steps: int
    """Optimizer steps in total."""
    best_checkpoint: str
    """Directory of the best checkpoint; without a validation split, of the last one."""
    validation: Mapping[str, float]
    """Its metrics on the validation split; empty without one."""
    test: Mapping[str, float]
    """Its metrics on the test split; empty where the data have no other images than those of the validation split."""
    last: Mapping[str, float]
    """Metrics of the last checkpoint by split and name, such as "test/top1": on the test split, if there is one."""
    history: tuple[Mapping[str, float], ...]
    """Metrics of each epoch."""
    ended: Ending | None = None
    """Why it ended before its last epoch."""

    @property
    def reported(self) -> dict[str, float]:
        """Metrics of the run by split and name: the best checkpoint's, and the last one's after `last/`."""
        split, best = ("test", self.test) if self.test else ("val", self.validation)
        return {
            **{f"{split}/{name}": value for name, value in best.items()},
            **{f"last/{name}": value for name, value in self.last.items()},
        }


@restored_thread_count()
def train(
    config: Config,
    store: Store,
    run_dir: Path,
    group: ProcessGroup,
    sink: EventSink,
    before_step: BeforeStep | None = None,
    stop_requested: StopRequested = never,
) -> Outcome:
    """Trains from the latest committed checkpoint, or from scratch, to the end; then tests the best and the last one.

    Without a validation split nothing is selected: the last checkpoint takes the place of the best.

    Args:
        config: of the run.
        store: its data.
        run_dir: the run's directory, which all ranks share.
        group: this process's rank and group.
        sink: receives events on rank 0.
        before_step: called before each optimizer step.
        stop_requested: whether to stop after the next step; rank 0 decides, and commits a checkpoint.

    Returns:
        The metrics of the best checkpoint.

    Raises:
        TrainingStopped: it was asked to stop; raised on all ranks.
        NonFiniteError: a loss or a gradient is not finite; raised on all ranks at the same step.
        UserError: the configuration does not fit the data, or the checkpoints of another configuration are there.
        RunError: a checkpoint cannot be written.
    """
    try:
        return _train(config, store, run_dir, group, sink, before_step, stop_requested)
    except OSError as error:
        sentence = disk_problem(error)
        if sentence is None:
            raise
        raise RunError(f"{sentence}; then run the same command again to resume") from error


def _train(
    config: Config,
    store: Store,
    run_dir: Path,
    group: ProcessGroup,
    sink: EventSink,
    before_step: BeforeStep | None,
    stop_requested: StopRequested,
) -> Outcome:
    _set_arithmetic(config)
    if group.device.type == "cpu":
        keep_freed_memory()
    task, splits, plan = prepare_parts(config, store, group)
    state = TrainingState(config, group, store.manifest.content_hash, plan.steps_per_epoch)
    folder = CheckpointFolder(run_dir / "checkpoints")
    sink = mirrored(config.checkpoint.mirror, run_dir, group, sink, config.train.epochs)
    _resume(state, task, folder, sink)
    if splits.val is None:
        sink.emit(Note("the data have no validation split: the last epoch is reported, no checkpoint is selected"))
    if isinstance(plan, EpochPlan) and plan.training.balance is not None:
        sink.emit(Note(plan.training.balance.coverage(store.manifest.class_names)))
    _settle_gradient_exchange(state, task, store, plan)
    if group.is_main and state.step == 0:
        path = run_dir / "report" / "training_batch.png"
        with _plot_that_may_fail(path, sink):
            _draw_first_batch(config, task, store, plan, path)
    meter, ended = Meter(), None
    for epoch in range(state.epoch, config.train.epochs):
        if (ended := reason_to_end(state, splits)) is not None:
            sink.emit(Note(ended.why))
            if ended.max_minutes is not None:  # the time may have passed after the epoch's checkpoint was due
                _save(state, folder, sink)
            break
        batches = splits.train.epoch(plan, epoch, start_step=state.step_in_epoch)
        for batch in ahead(batches, group.device, config.train.channels_last):
            if before_step is not None:
                before_step(group, state.step)
            stopping = training_step(state, task, batch, meter, sink, stop_requested)
            timely = due(config.checkpoint.every_steps, state.step) and state.step_in_epoch < state.steps_per_epoch
            if timely or stopping:
                stopping |= settle(state, sink)
                _save(state, folder, sink)
            if stopping:
                raise TrainingStopped(state.step)
        if settle(state, sink):
            _save(state, folder, sink)
            raise TrainingStopped(state.step)
        try:
            _finish_epoch(state, task, splits, plan, folder, sink, stop_requested)
        except EvaluationStopped:
            _save(state, folder, sink)
            raise TrainingStopped(state.step) from None
        meter.restart()
    try:
        return replace(_test_best(state, task, splits, folder, run_dir, sink, stop_requested), ended=ended)
    except EvaluationStopped:
        raise TrainingStopped(state.step) from None


def _set_arithmetic(config: Config) -> None:
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    if torch.are_deterministic_algorithms_enabled() != config.train.deterministic:  # it imports torch's compiler: 2 s
        torch.use_deterministic_algorithms(config.train.deterministic)
    torch.backends.cudnn.benchmark = not config.train.deterministic


def _resume(state: TrainingState, task: AnyTask, folder: CheckpointFolder, sink: EventSink) -> None:
    """Resumes from the latest checkpoint of rank 0, on all ranks."""
    if state.group.is_main:
        folder.clean()
    _refuse_unshared_storage(state.group, folder)
    latest = state.group.broadcast(folder.latest())
    recorded: CpuForm | None = None
    if latest is not None:
        snapshot = load_checkpoint(latest)
        threads = state.restore(snapshot)
        recorded = CheckpointState.of(snapshot.state, "to resume from").kernels
        sink.emit(Note(f"resuming from {latest.name} (epoch {state.epoch + 1}, step {state.step})"))
        if threads is not None:
            sink.emit(Note(threads))
        _forget_lost_best(state, folder, sink)
    elif state.config.train.segment is not None:
        raise UserError(
            "train.segment is set, but there is no checkpoint that the segment begins from; leave it out: "
            "`spikefleet train RECIPE --resume RUN --extend-epochs N` sets it"
        )
    elif (digest := state.config.train.initial_weights) is None and state.config.init.source is not None:
        raise UserError(
            f"init.from={state.config.init.source} is read by `spikefleet train` alone; leave it out here, or set "
            "train.initial_weights"
        )
    elif digest is not None:
        state.start_from(load_initial_weights(folder.folder.parent / INITIAL_WEIGHTS, digest))
        sink.emit(Note(f"starting from the weights in {INITIAL_WEIGHTS}"))
    models = (state.train_model, state.eval_model)
    settled = settle_form(models, state.group, sink, recorded, state.config.train.compile)
    state.cpu_form = settled.form
    metadata = {
        "parameters": sum(p.numel() for p in state.network.parameters()),
        "device": str(state.group.device),
        "kernels": state.settle_weight_gradients(settled.description),
        "threads": thread_counts(state.group),
        **library_versions(),
    }
    epochs, steps = state.config.train.epochs, state.steps_per_epoch
    sink.emit(Started(state.step, epochs * steps, steps, epochs, metadata, task.headline))


def _forget_lost_best(state: TrainingState, folder: CheckpointFolder, sink: EventSink) -> None:
    """Chooses the best checkpoint anew if the one so far is lost: damaged, or removed when a later one was better."""
    step = None if state.best is None else state.best["step"]
    if step is None or state.group.broadcast(not state.group.is_main or folder.is_intact(step)):
        return
    sink.emit(Note(f"the best checkpoint so far, of step {step}, is lost; the best one is chosen from here on"))
    state.best = None


def _refuse_unshared_storage(group: ProcessGroup, folder: CheckpointFolder) -> None:
    """Raises, on all ranks, unless each rank sees the files of rank 0."""
    probe = folder.folder / f"partial-probe-{group.broadcast(uuid.uuid4().hex)}"
    try:
        if group.is_main:
            probe.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"{folder.folder} cannot be written: {error}; free disk space or fix the storage") from error
    group.broadcast(None)
    blind = [rank for rank, sees in enumerate(group.all_gather(probe.is_dir())) if not sees]
    if group.is_main:
        probe.rmdir()
    if blind:
        raise UserError(
            f"run directory {folder.folder.parent} is missing on rank {', '.join(map(str, blind))}; "
            "set --runs-dir to a directory that all nodes share"
        )


def _settle_gradient_exchange(state: TrainingState, task: AnyTask, store: Store, plan: TrainingPlan) -> None:
    """Runs one backward pass whose gradients are discarded, so that a resumed run is bit-exact.

    DDP rebuilds its buckets after the first backward pass, and with three or more ranks the buckets decide in which
    order floating-point numbers are added.
    """
    group, config = state.group, state.config
    if group.size == 1:
        return
    batch = _first_batch(config, store, plan).to(group.device, config.train.channels_last)
    buffers = {name: buffer.clone() for name, buffer in state.network.named_buffers()}
    state.train_mode()
    with torch.random.fork_rng(), state.autocast():
        values = task.loss(state.ddp_model, batch, state.balance)
    values["loss"].backward()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in state.network.named_buffers():
            buffer.copy_(buffers[name])


@contextmanager
def _plot_that_may_fail(path: Path, sink: EventSink) -> Iterator[None]:
    """A plot that no certificate needs: where it fails, the training says so and continues."""
    try:
        yield
    except Exception as error:
        reason = disk_problem(error, path) or f"{type(error).__name__}: {error}"
        sink.emit(Note(f"the plot {path.name} was not drawn: {reason}"))


def _first_batch(config: Config, store: Store, plan: TrainingPlan) -> Batch:
    """The first micro-batch, from a separate loader, so that the loader of the training keeps its position."""
    batch = next(iter(training_loader(store, config).epoch(plan, epoch=0)))
    return next(micro_batches(batch, config.train.accumulate))


def _draw_first_batch(config: Config, task: AnyTask, store: Store, plan: TrainingPlan, path: Path) -> None:
    """Plots the first training images as the network sees them, without normalisation."""
    batch = _first_batch(config, store, plan)
    shown = min(_IMAGES_OF_BATCH, len(batch.indices))
    task.report.draw_batch(config.transform.pixels(batch.images[:shown]), batch.targets[:shown], path)


def _finish_epoch(
    state: TrainingState,
    task: AnyTask,
    splits: Splits,
    plan: TrainingPlan,
    folder: CheckpointFolder,
    sink: EventSink,
    stop_requested: StopRequested,
) -> None:
    """Evaluates, moves the position to the next epoch, and saves a checkpoint if it is due or the best so far.

    Of equal epochs the later one is the best: it has trained longer.
    """
    config = state.config
    row = {"epoch": float(state.epoch + 1)}
    row |= {f"train/{name}": total / plan.samples_of(state.epoch) for name, total in state.sums.items()}
    if config.shortcut.enabled:
        row["balance_coefficient"] = state.balance
    gradients = _gradient_table(state)
    last = state.epoch + 1 == config.train.epochs or out_of_time(state, state.epoch + 1) is not None
    evaluation: Evaluation[Any, Any] | None = None
    measured: dict[str, float] = {}
    if splits.val is not None and (last or due(config.train.evaluate_every, state.epoch + 1)):
        sink.emit(Phase("validating"))
        evaluation = _evaluate(state, task, splits.val, stop_requested)
        measured = state.group.broadcast(evaluation and task.metrics(evaluation.predictions, evaluation.targets))
        if config.checkpoint.metric not in measured:
            raise UserError(
                f"checkpoint.metric={config.checkpoint.metric} is undefined on the validation split; set it to one of "
                f"{', '.join(measured)}"
            )
        row |= {f"val/{name}": value for name, value in measured.items()}
    if evaluation is not None:
        row |= {f"spikes/{name}": value for name, value in evaluation.health.items()}
    state.epoch, state.step_in_epoch, state.sums = state.epoch + 1, 0, {}
    state.lanes.clear()
    state.history.append(row)
    best = bool(measured) and _improves(config.checkpoint, state.best, measured)
    timely = due(config.checkpoint.every_epochs, state.epoch) or due(config.checkpoint.every_steps, state.step)
    if best or (splits.val is None and (last or timely)):
        state.best = {"step": state.step, "epoch": state.epoch, "metrics": measured}
    layers = () if evaluation is None else evaluation.layers
    state.clock.end_epoch()
    sink.emit(EpochDone(state.epoch, state.step, row, best, layers, gradients))
    if best or last or timely or stops_early(config, state.history) is not None:
        _save(state, folder, sink)


def _evaluate(
    state: TrainingState, task: AnyTask, loader: BatchLoader, stop_requested: StopRequested, over_time: bool = False
) -> Evaluation[Any, Any] | None:
    config, group = state.config.train, state.group
    return evaluate(state.eval_model, task, loader, config, group, stop_requested=stop_requested, over_time=over_time)


def _improves(config: CheckpointConfig, best: Mapping[str, Any] | None, measured: Mapping[str, float]) -> bool:
    if best is None or math.isnan(best["metrics"][config.metric]):  # nothing is better or worse than no number
        return True
    gain = measured[config.metric] - best["metrics"][config.metric]
    return gain >= 0 if config.mode == "max" else gain <= 0


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
    state: TrainingState,
    task: AnyTask,
    splits: Splits,
    folder: CheckpointFolder,
    run_dir: Path,
    sink: EventSink,
    stop_requested: StopRequested,
) -> Outcome:
    """Evaluates the best checkpoint on the test split, writes the report of the run, and tests the last checkpoint."""
    assert state.best is not None, "the last epoch is always evaluated"
    step, best, split = state.step, state.best, splits.test.split.name
    path = state.group.broadcast(folder.at(best["step"]))  # waits until rank 0 has committed it
    state.load_weights(load_checkpoint(path))
    sink.emit(Phase("testing"))
    evaluation = _evaluate(state, task, splits.test, stop_requested, over_time=True)
    metrics: dict[str, float] = {}
    if evaluation is not None:
        chosen = f"best checkpoint by val/{state.config.checkpoint.metric}" if splits.val else "last checkpoint"
        sink.emit(Note(f"testing {path.name}, the {chosen}"))
        details = evaluation.details(task)
        metrics = details["metrics"]
        found, report = (evaluation.predictions, evaluation.targets), run_dir / "report"
        if (reason := save_per_image(task, *found, splits.test.split, report)) is not None:
            sink.emit(Note(reason))
        sink.emit(Phase("drawing plots"))
        task.report.write(details, *found, report)
        shown = min(_IMAGES_OF_REPORT, len(evaluation.targets))
        images = splits.test.pictures(range(shown))
        plot = report / "predictions.png"
        with _plot_that_may_fail(plot, sink):
            task.report.draw(images, evaluation.predictions[:shown], evaluation.targets[:shown], plot)
        curve = report / "learning_curve.png"
        with _plot_that_may_fail(curve, sink):
            plots.learning_curve(state.history, state.config.checkpoint.metric, curve)
    metrics = state.group.broadcast(metrics)
    last = metrics if best["step"] == step else _test_last(state, task, splits, folder.at(step), sink, stop_requested)
    named = {f"{split}/{name}": value for name, value in last.items()}
    test = metrics if split == "test" else {}
    return Outcome(step, str(path), best["metrics"], test, named, tuple(state.history))


def _test_last(
    state: TrainingState, task: AnyTask, splits: Splits, path: Path, sink: EventSink, stop_requested: StopRequested
) -> dict[str, float]:
    """Metrics of the last checkpoint on the test split; those of the validation split were measured with its epoch."""
    if splits.test.split.name == "val":
        return {key.removeprefix("val/"): value for key, value in state.history[-1].items() if key.startswith("val/")}
    sink.emit(Note(f"testing {path.name}, the last checkpoint"))
    sink.emit(Phase("testing the last checkpoint"))
    state.load_weights(load_checkpoint(path))
    evaluation = _evaluate(state, task, splits.test, stop_requested)
    metrics: dict[str, float] = state.group.broadcast(
        evaluation and task.metrics(evaluation.predictions, evaluation.targets)
    )
    return metrics
