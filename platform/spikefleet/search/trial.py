"""One trial of a search: a training with the trial's overrides, and the figures of its best checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spikefleet.certificates.energy_card import measure_energy, write_card
from spikefleet.config.recipes import load_config
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import write_json
from spikefleet.plugins import load_plugins
from spikefleet.runs.run_dir import Run
from spikefleet.training.checkpoints import best_network, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.event_log import ResumedRunSink
from spikefleet.training.events import CheckpointSaved, EpochDone, Event, Started
from spikefleet.training.loop import Outcome, train
from spikefleet.training.step import NonFiniteError
from spikefleet.versions import code_version
from spikefleet_models.families import build_model
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.trials import BEST, Overrides, Report, TrialPruned

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
"""What population based training may change in the middle: no weight's shape depends on it."""

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class TrialSetting:
    """What all trials of a search share."""

    recipe: str
    store: str
    runs_dir: Path
    workers: int = 1
    cpus_per_worker: float = 1.0
    gpu: bool = False
    shares_checkpoints: bool = False
    """Trials take over one another's checkpoints (pbt)."""
    energy_by_epoch: bool = False
    """Energy is measured with each new best checkpoint, so that a trial that is stopped early has one too."""
    plugins: tuple[str, ...] = ()
    """Modules that the driver has loaded."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Overrides that say where the data lie and how they are loaded."""

    def config(self, overrides: Overrides) -> Config:
        """The configuration of a trial. Raises UserError naming what is wrong."""
        in_process = self.workers == 1
        own = {
            "cluster.workers": 0 if in_process else self.workers,
            "cluster.cpus_per_worker": self.cpus_per_worker,
            "cluster.gpu": self.gpu,
            **({"checkpoint.every_epochs": 1} if self.shares_checkpoints else {}),
        }
        return load_config(self.recipe, {**self.data, **overrides, **own})


def mutable_keys(config: Config, keys: Sequence[str]) -> Callable[[str], bool]:
    """Which of the keys of a space may change in the middle of training; `config` is that of some point.

    T is not among them where the decoder is an ASD in any branch of the space: its temporal attention has T inputs.
    """
    bound_to_time = getattr(config.model, "decoder", None) == "asd" or any(key.endswith(".decoder") for key in keys)

    def mutable(key: str) -> bool:
        if key.endswith("timesteps") and bound_to_time:
            return False
        return key in _CHANGEABLE

    return mutable


class ReportSink:
    """Hands the figures of each epoch to the search; with its checkpoint where trials hand theirs on.

    A best epoch is reported when its checkpoint is there, since the search may end the trial in that moment.
    `energy_of`, where it is given, measures it before.
    """

    def __init__(
        self, report: Report, shares_checkpoints: bool, energy_of: Callable[[Path], float] | None = None
    ) -> None:
        self._report, self._shares_checkpoints, self._energy_of = report, shares_checkpoints, energy_of
        self._waiting: dict[str, float] | None = None
        self._measure = False

    def emit(self, event: Event) -> None:
        if isinstance(event, EpochDone) and any(key.startswith("val/") for key in event.metrics):
            self._waiting = {**event.metrics, "epoch": float(event.epoch), BEST: float(event.best)}
            self._measure = event.best and self._energy_of is not None
            if not self._shares_checkpoints and not event.best:
                self._flush(None)
        elif isinstance(event, Started):  # a group begins again, and that epoch with it
            self._waiting = None
        elif isinstance(event, CheckpointSaved) and self._waiting is not None:
            self._flush(Path(event.path))

    def _flush(self, checkpoint: Path | None) -> None:
        metrics, self._waiting = self._waiting, None
        assert metrics is not None
        if self._measure and checkpoint is not None and self._energy_of is not None:
            metrics["energy_mj"] = self._energy_of(checkpoint)
        self._report(metrics, checkpoint if self._shares_checkpoints else None)


def as_trial(setting: TrialSetting) -> Callable[[Overrides, str, Report], dict[str, float]]:
    """A trainable for `spikefleet_tune`: a plain in-process training, or a Ray Train run of several workers.

    Its figures are those of the best checkpoint: `val/...`, `test/...`, `energy_mj` and `parameters`. A trial that is
    started again by the same name goes on from its last checkpoint. A loss that is not finite prunes it.
    """

    def trainable(overrides: Overrides, name: str, report: Report) -> dict[str, float]:
        load_plugins(setting.plugins)
        config = setting.config(overrides)
        store = Store.open(setting.store, verify=False)  # the driver has verified it
        run = Run(setting.runs_dir / name)
        with run.lock(patience_s=_PATIENCE_S):  # a process of an earlier attempt may not have ended yet
            return train_trial(run, config, store, report)

    def train_trial(run: Run, config: Config, store: Store, report: Report) -> dict[str, float]:
        if report.start_from is not None:
            _take_over(run, config, report.start_from)
        run.begin(config, DataSummary.of(store.manifest))

        def energy_of(checkpoint: Path) -> float:
            with torch.random.fork_rng(devices=[]):  # a new network draws from the generator of the training
                network = best_network(load_checkpoint(checkpoint), config.model)
            card = measure_energy(network, config.data.transform, store.split("val"))
            write_card(card, run.path / "report")
            return card.energy_mj

        sink = ReportSink(report, setting.shares_checkpoints, energy_of if setting.energy_by_epoch else None)
        if not setting.shares_checkpoints:
            _report_best_so_far(run, sink)
        try:
            outcome = _train(config, store, run, sink)
        except NonFiniteError as error:
            raise TrialPruned(str(error)) from None
        energy_mj = energy_of(Path(outcome.best_checkpoint))
        run.note(
            status="finished",
            validation=dict(outcome.validation),
            test=dict(outcome.test),
            code_version=code_version(),
        )
        figures = {f"val/{key}": value for key, value in outcome.validation.items()}
        figures |= {f"test/{key}": value for key, value in outcome.test.items()}
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build_model(config.model).parameters())
        return {**figures, "energy_mj": energy_mj, "parameters": float(parameters)}

    return trainable


def _report_best_so_far(run: Run, sink: ReportSink) -> None:
    """A trial that goes on after its process died tells its best epoch again: what it told before is lost."""
    latest = run.checkpoints.latest()
    if latest is None or (state := load_checkpoint(latest).state)["best"] is None:
        return
    best = state["best"]
    row = next(row for row in state["history"] if row["epoch"] == best["epoch"])
    sink.emit(EpochDone(best["epoch"], best["step"], row, best=True, layers=(), gradients=()))
    sink.emit(CheckpointSaved(best["step"], str(run.checkpoints.at(best["step"]))))


def _train(config: Config, store: Store, run: Run, sink: ReportSink) -> Outcome:
    if config.cluster.workers == 0:
        return train(config, store, run.path, ProcessGroup.single(config.cluster.gpu), sink)
    from spikefleet.cluster.ray_train import train_on_ray

    return train_on_ray(config, store, run.path, ResumedRunSink(run.path, sink), lockstep=True)


def _take_over(run: Run, config: Config, start_from: Path) -> None:
    """Lays another trial's checkpoint into this run, under this trial's configuration.

    A trial that was only paused, or whose process died, is given its own one, and keeps what it has: its history then
    begins with that of the checkpoint.
    """
    snapshot = load_checkpoint(start_from)
    state, wanted = snapshot.state, config.dump()
    own = run.checkpoints.latest()
    if own is not None and snapshot.config == wanted:
        held = load_checkpoint(own)
        if held.config == wanted and held.state["history"][: len(state["history"])] == state["history"]:
            return
    if state["epoch"] >= config.train.epochs:
        raise TrialPruned("it was to go on from the end of another trial, which leaves nothing to train")
    run.forget_checkpoints()
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.path / "config.json", wanted)
    # The best so far was another configuration's: what counts for this trial begins here.
    step = state["epoch"] * state["steps_per_epoch"] + state["step_in_epoch"]
    run.checkpoints.save(step, snapshot.under(wanted, best=None))


def reportable(metric_names: Sequence[str]) -> set[str]:
    """What a trial of a task gives back that a search may pursue; test figures are for the report alone."""
    return {*(f"val/{name}" for name in metric_names), "energy_mj", "parameters"}


def chooses_data(key: str) -> bool:
    """Whether an override asks for another store, and not only for another way to show its pictures."""
    section, _, field_name = key.partition(".")
    return section == "data" and field_name.partition(".")[0] != "transform"


def refusal_of(setting: TrialSetting, fixed: Collection[str] = ()) -> Callable[[Mapping[str, Any]], str | None]:
    """What is wrong with the overrides of a trial, or None; `fixed` are keys that have the same value in all trials."""

    def complaint(overrides: Mapping[str, Any]) -> str | None:
        for key in overrides:
            if chooses_data(key) and key not in fixed:
                return f"{key} would need other data; all trials of a search share one store"
            if key.partition(".")[0] == "cluster":
                return f"{key} is set by the search's resources"
        try:
            setting.config(overrides)
        except UserError as error:
            return str(error)
        return None

    return complaint


def reported_by_epoch(metric_names: Sequence[str]) -> set[str]:
    """What a trial of a task reports after each epoch that a scheduler may decide by."""
    return {f"val/{name}" for name in metric_names}
