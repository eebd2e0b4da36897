"""One trial of a search: trains with the trial's overrides and returns the metrics of its best checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spikefleet.certificates.energy_card import measure_energy, write_card
from spikefleet.certificates.latency import LATENCY, LATENCY_MS, latency_on
from spikefleet.config.recipes import load_config
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import write_json
from spikefleet.plugins import load_plugins
from spikefleet.runs.run_dir import Run
from spikefleet.search.costs import COSTS
from spikefleet.training.checkpoint_state import CheckpointState
from spikefleet.training.checkpoints import best_network, checkpoint_hash, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.event_log import ResumedRunSink
from spikefleet.training.events import CheckpointSaved, EpochDone, Event, Started
from spikefleet.training.loop import Outcome, train
from spikefleet.training.step_reading import NonFiniteError
from spikefleet.training.stopping import TrainingStopped
from spikefleet.versions import code_version
from spikefleet_models.families import build_model
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.trials import BEST, Overrides, Report, TrialPruned, TrialStopped

_CHANGEABLE = (
    "model.timesteps",
    "model.backbone.timesteps",
    "model.neuron.bound",
    "shortcut.schedule",
    "shortcut.lambda0",
    "optim.lr",
    "optim.momentum",
    "optim.weight_decay",
)
"""Keys that population-based training may change during training: the shape of no weight depends on them."""

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class TrialSetting:
    """The settings that all trials of a search share."""

    recipe: str
    store: str
    runs_dir: Path
    workers: int = 1
    cpus_per_worker: float = 1.0
    gpu: bool = False
    shares_checkpoints: bool = False
    """Trials resume from one another's checkpoints (pbt)."""
    energy_by_epoch: bool = False
    """Measure energy with each new best checkpoint, so that a trial that is stopped early has one too."""
    latency: bool = False
    """Measure the latency of each trial, which is an objective; with each new best checkpoint as the energy is."""
    plugins: tuple[str, ...] = ()
    """Modules of the driver's plugins."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Overrides with the location and the loading of the data."""

    def config(self, overrides: Overrides) -> Config:
        """The configuration of a trial. Raises UserError with a message for each invalid field."""
        in_process = self.workers == 1
        own = {
            "cluster.workers": 0 if in_process else self.workers,
            "cluster.cpus_per_worker": self.cpus_per_worker,
            "cluster.gpu": self.gpu,
            **({"checkpoint.every_epochs": 1} if self.shares_checkpoints else {}),
        }
        return load_config(self.recipe, {**self.data, **overrides, **own})


_DECODERS_OVER_TIME = ("asd", "weighted")


def mutable_keys(config: Config, keys: Sequence[str]) -> Callable[[str], bool]:
    """Which keys of a space may change during training.

    T may not if the decoder has weights over T in any branch of the space, as the temporal attention of an ASD.

    Args:
        config: configuration of some point.
        keys: keys of the space.
    """
    # The twin of a network has no such decoder, but its siblings in the space may.
    named = getattr(config.model, "decoder", None) in _DECODERS_OVER_TIME and "model.connection" in keys
    bound_to_time = config.model.needs_all_timesteps or named or any(key.endswith(".decoder") for key in keys)

    def mutable(key: str) -> bool:
        if key.endswith("timesteps") and bound_to_time:
            return False
        return key in _CHANGEABLE

    return mutable


class ReportSink:
    """An event sink that reports the metrics of each epoch to the search.

    A best epoch is reported after its checkpoint is saved, since the search may stop the trial at that moment.

    Args:
        report: of the trial.
        shares_checkpoints: report the checkpoint of each epoch too (pbt).
        costs_of: measures energy and latency of each best checkpoint, by the names of their metrics.
    """

    def __init__(
        self, report: Report, shares_checkpoints: bool, costs_of: Callable[[Path], dict[str, float]] | None = None
    ) -> None:
        self._report, self._shares_checkpoints, self._costs_of = report, shares_checkpoints, costs_of
        self._waiting: dict[str, float] | None = None
        self._measure = False

    def emit(self, event: Event) -> None:
        """Reports an epoch when its evaluation and, if needed, its checkpoint are there."""
        if isinstance(event, EpochDone) and any(key.startswith("val/") for key in event.metrics):
            self._waiting = {**event.metrics, "epoch": float(event.epoch), BEST: float(event.best)}
            self._measure = event.best and self._costs_of is not None
            if not self._shares_checkpoints and not event.best:
                self._flush(None)
        elif isinstance(event, Started):  # the group restarts, and repeats the epoch
            self._waiting = None
        elif isinstance(event, CheckpointSaved) and self._waiting is not None:
            self._flush(Path(event.path))

    def _flush(self, checkpoint: Path | None) -> None:
        metrics, self._waiting = self._waiting, None
        assert metrics is not None
        if self._measure and checkpoint is not None and self._costs_of is not None:
            metrics |= self._costs_of(checkpoint)
        self._report(metrics, checkpoint if self._shares_checkpoints else None)


def as_trial(setting: TrialSetting) -> Callable[[Overrides, str, Report], dict[str, float]]:
    """A trainable for `spikefleet_tune`: training in the trial's process, or on a Ray Train group of several workers.

    It returns the metrics of the best checkpoint: `val/...`, `test/...` (where the data have such images), `energy_mj`,
    `latency_ms` where that is an objective, and `parameters`; and those of the last one, `last/test/...`. A restarted
    trial resumes from its last checkpoint. A loss that is not finite prunes the trial. A search that is asked to stop
    gets a checkpoint of each running trial.
    """

    def trainable(overrides: Overrides, name: str, report: Report) -> dict[str, float]:
        load_plugins(setting.plugins)
        config = setting.config(overrides)
        store = Store.open(setting.store, verify=False)  # the driver has verified it
        run = Run(setting.runs_dir / name)
        with run.lock(patience_s=_PATIENCE_S):  # a process of an earlier attempt may still be ending
            return train_trial(run, config, store, report)

    def train_trial(run: Run, config: Config, store: Store, report: Report) -> dict[str, float]:
        if report.start_from is not None:
            _start_from(run, config, report.start_from)
        run.begin(config, DataSummary.of(store.manifest))

        def costs_of(checkpoint: Path) -> dict[str, float]:
            with torch.random.fork_rng(devices=[]):  # building a network must not advance the training's generator
                network = best_network(load_checkpoint(checkpoint), config.model)
            card = measure_energy(network, config.transform, store.samples("val"))
            write_card(card, run.path / "report")
            costs = {"energy_mj": card.energy_mj}
            if setting.latency:
                latency = latency_on(network, config, store.samples("val"))
                # With its checkpoint, so that a registration keeps the latency that the trial was chosen by.
                recorded = {**latency.to_dict(), "checkpoint": checkpoint_hash(checkpoint)}
                write_json(run.path / "report" / LATENCY, recorded)
                costs[LATENCY_MS] = latency.median_ms
            return costs

        sink = ReportSink(report, setting.shares_checkpoints, costs_of if setting.energy_by_epoch else None)
        if not setting.shares_checkpoints:
            _report_best_so_far(run, sink)
        try:
            outcome = _train(config, store, run, sink, report.stop_signal)
        except NonFiniteError as error:
            raise TrialPruned(str(error)) from None
        except TrainingStopped as stopped:
            run.note(status="interrupted", signal=report.stop_signal())
            raise TrialStopped(str(stopped)) from None
        costs = costs_of(Path(outcome.best_checkpoint))
        run.note(
            status="finished",
            signal=None,
            validation=dict(outcome.validation),
            test=dict(outcome.test),
            last=dict(outcome.last),
            code_version=code_version(),
        )
        metrics = {f"val/{key}": value for key, value in outcome.validation.items()} | outcome.reported
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build_model(config.model).parameters())
        return {**metrics, **costs, "parameters": float(parameters)}

    return trainable


def _report_best_so_far(run: Run, sink: ReportSink) -> None:
    """A trial that resumes after its process died reports its best epoch again: earlier reports are lost."""
    latest = run.checkpoints.latest()
    if latest is None or (best := (state := CheckpointState.of(load_checkpoint(latest).state, latest)).best) is None:
        return
    row = next((row for row in state.history if row.get("epoch") == best.epoch), None)
    if row is None:
        return
    sink.emit(EpochDone(best.epoch, best.step, row, best=True, layers=(), gradients=()))
    sink.emit(CheckpointSaved(best.step, str(run.checkpoints.at(best.step))))


def _train(config: Config, store: Store, run: Run, sink: ReportSink, stop_signal: Callable[[], str | None]) -> Outcome:
    if config.cluster.workers == 0:
        group = ProcessGroup.single(config.cluster.gpu)
        return train(config, store, run.path, group, sink, stop_requested=lambda: stop_signal() is not None)
    from spikefleet.cluster.ray_train import train_on_ray

    return train_on_ray(config, store, run.path, ResumedRunSink(run.path, sink), lockstep=True, stop_signal=stop_signal)


def _start_from(run: Run, config: Config, start_from: Path) -> None:
    """Copies another trial's checkpoint into this run, with this trial's configuration.

    A trial that was paused, or whose process died, gets its own checkpoint and keeps its newer ones: their history
    starts with that of the checkpoint.
    """
    snapshot = load_checkpoint(start_from)
    state, wanted = CheckpointState.of(snapshot.state, start_from), config.dump()
    own = run.checkpoints.latest()
    if own is not None and snapshot.config == wanted:
        held = load_checkpoint(own)
        history = CheckpointState.of(held.state, own).history
        if held.config == wanted and history[: len(state.history)] == state.history:
            return
    if state.epoch >= config.train.epochs:
        raise TrialPruned("the trial would resume from the end of another trial, with nothing to train")
    run.forget_checkpoints()
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.path / "config.json", wanted)
    # The best epoch so far belongs to another configuration.
    step = state.epoch * state.steps_per_epoch + state.step_in_epoch
    run.checkpoints.save(step, snapshot.under(wanted, best=None))


def reportable(metric_names: Sequence[str]) -> set[str]:
    """Metrics of a trial that a search may optimise; test metrics are for the report only."""
    return {*(f"val/{name}" for name in metric_names), *COSTS}


def chooses_data(key: str) -> bool:
    """Whether an override selects another store, not only another transform of its images."""
    section, _, field_name = key.partition(".")
    return section == "data" and field_name.partition(".")[0] != "transform"


def refusal_of(setting: TrialSetting, fixed: Collection[str] = ()) -> Callable[[Mapping[str, Any]], str | None]:
    """A function that checks the overrides of a trial: it returns the error message, or None if they are valid.

    Args:
        setting: of the search.
        fixed: keys with the same value in all trials.
    """

    def problem(overrides: Mapping[str, Any]) -> str | None:
        for key in overrides:
            if chooses_data(key) and key not in fixed:
                return f"{key} selects other data, but all trials share one store; move it to overrides"
            if key.partition(".")[0] == "cluster":
                return f"{key} cannot be searched; set the search's resources instead"
        try:
            setting.config(overrides)
        except UserError as error:
            return str(error)
        return None

    return problem


def reported_by_epoch(metric_names: Sequence[str]) -> set[str]:
    """Metrics that a trial reports after each epoch, by which a scheduler may decide."""
    return {f"val/{name}" for name in metric_names}
