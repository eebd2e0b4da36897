"""A run from start to end: data, directory, tracking, training, report, registration."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass

import torch
from rich.console import Console

from spikefleet.certificates.certify import Certificates, certify
from spikefleet.cluster.session import check_address, quiet_ray, refuse_missing_gpus
from spikefleet.config.schema import Config
from spikefleet.data_access import open_data
from spikefleet.data_summary import DataSummary
from spikefleet.disks import disk_problem
from spikefleet.errors import RunError, UserError
from spikefleet.outputs import check_place
from spikefleet.registry.api import Promotion
from spikefleet.registry.version import check_model_name
from spikefleet.runs.initial_weights import InitialWeights, resolve_init, tell_init
from spikefleet.runs.observer import RunObserver, finished_description
from spikefleet.runs.options import Options
from spikefleet.runs.progress import build_display
from spikefleet.runs.registration import check_gates, keep_back, promote_version, register_run
from spikefleet.runs.report import complete_report
from spikefleet.runs.run_dir import Run, check_run_name, default_run_name
from spikefleet.runs.run_log import LoggedDisplay
from spikefleet.runs.run_page import dataset_of, registration_sentence, split_sizes
from spikefleet.runs.segments import (
    begin_extension,
    begin_segment,
    end_of,
    extends,
    is_complete,
    registered_before,
    schedule_of,
)
from spikefleet.status import Announce, print_line, waiting
from spikefleet.stop_signals import StopSignals
from spikefleet.tracking.journal import Journal
from spikefleet.tracking.mlflow_client import page_of, resolve_tracking_uri
from spikefleet.tracking.mlflow_pages import NOTE
from spikefleet.tracking.tracker import Tracker, annotate, sync
from spikefleet.training.distributed import ProcessGroup, pick_device
from spikefleet.training.event_log import ResumedRunSink
from spikefleet.training.events import EventSink
from spikefleet.training.fine_tuning import check_names
from spikefleet.training.loop import BeforeStep, Outcome, train
from spikefleet.training.memory import check_memory
from spikefleet.training.mirror import Mirror
from spikefleet.training.mirror_owner import Owner, refuse_other
from spikefleet.training.splits import prepare_parts
from spikefleet.training.stopping import TrainingStopped
from spikefleet_models.families import build_model
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.interruption import Interrupted, interruption

_FLUSH_S = 30.0
_INTERRUPTED_FLUSH_S = 3.0


@dataclass(frozen=True)
class FinishedRun:
    """A finished run with the metrics of its best checkpoint, or of its last one where nothing was selected."""

    run: Run
    validation: Mapping[str, float]
    """Empty where the data have no validation split."""
    test: Mapping[str, float]
    """Empty where the data have no other images than those of the validation split."""
    last: Mapping[str, float]
    """Metrics of the last checkpoint, with their split; empty for runs of versions that did not test it."""
    promotion: Promotion | None
    """The result of the registration; None if nothing was registered now."""
    look_at: str
    """Link to the run in MLflow, or the command that opens MLflow's UI."""


def run_training(
    config: Config,
    options: Options,
    console: Console,
    name: str | None = None,
    before_step: BeforeStep | None = None,
) -> FinishedRun:
    """Trains or resumes a run; then tests, certifies and registers its best checkpoint.

    Args:
        config: the configuration.
        options: directories and cluster.
        console: for progress.
        name: of the run; by default the recipe with a digest of the configuration.
        before_step: called on each rank before each optimizer step.

    Returns:
        The metrics of the best checkpoint, and its registration.

    Raises:
        UserError: an error that the user can fix, before training starts.
        RunError: the training or the registration failed.
        Interrupted: SIGINT or SIGTERM stopped it; the same call resumes it.
    """
    check_place(options.runs_dir, "--runs-dir")
    config, initial = resolve_init(config, options, resolve_tracking_uri(options.runs_dir), console)
    run = Run(options.runs_dir.resolve() / check_run_name(name or default_run_name(config)))
    signals = StopSignals(console)
    with signals.handled():
        return _run(config, options, console, run, before_step, signals, initial)


def _run(
    config: Config,
    options: Options,
    console: Console,
    run: Run,
    before_step: BeforeStep | None,
    signals: StopSignals,
    initial: InitialWeights | None,
) -> FinishedRun:
    tracking_uri = resolve_tracking_uri(options.runs_dir)
    pick_device(config.cluster.gpu and config.cluster.workers == 0)
    complete = is_complete(run, config)
    if not complete:
        refuse_missing_gpus(options.address, config.cluster.least_workers if config.cluster.gpu else 0)
        if config.cluster.workers:
            check_address(options.address)
    store = open_data(config.data, options.stores_dir, console)
    with waiting(console, "checking the configuration against the data"):
        _check_names_of_modules(config)
        shape = DataSummary.of(store.manifest).input_shape(config.data.transform)
        if config.checkpoint.mirror is not None:
            _refuse_mirror_of_another(config.checkpoint.mirror, run)
        check_memory(config, shape, local=options.address is None)
        prepare_parts(config, store, ProcessGroup(0, config.cluster.most_workers, torch.device("cpu")))
        if options.promote and not run.record().get("registered"):
            check_gates(config, store, options.stores_dir)
    _check_registered_name(config, DataSummary.of(store.manifest), console)
    with ExitStack() as held:
        with waiting(console, "starting Ray"):
            held.enter_context(nullcontext() if complete else _processes(config, options))
        held.enter_context(run.lock())
        if initial is not None:
            tell_init(initial, console)
            if not run.exists:  # one that exists is compared with the configuration first
                initial.write(run)
        further = extends(run, config)
        run.begin(run.config() if further else config, DataSummary.of(store.manifest))
        if further:
            begin_extension(run, config)
            print_line(console, f"run {run.name} is extended; {schedule_of(config)}")
        elif run.record()["status"] == "finished" and not (complete := is_complete(run, config)):
            begin_segment(run, config)
        run.note(store=store.absolute_location)
        if complete:
            print_line(console, _of_complete(run))
            look_at = page_of(tracking_uri)
        else:
            look_at = _train_tracked(config, options, console, run, store, tracking_uri, before_step, signals)
        record = run.record()
        if config.registry.register_best and not record.get("registered") and (held_by := registered_before(run)):
            print_line(console, f"no later checkpoint is better: {held_by} stays the registered one")
            run.note(registered=held_by)
        with waiting(console, "registering the best checkpoint") as announce:
            promotion = _register_once(config, run, store, tracking_uri, options, announce)
        last = record.get("last", {})
        return FinishedRun(run, record["validation"], record["test"], last, promotion, look_at)


def _of_complete(run: Run) -> str:
    """The sentence for a run of which nothing is left to train."""
    ended = run.record().get("ended")
    if ended is None:
        return f"run {run.name} is complete; to train another run, set --name or other overrides"
    further = f"--resume {run.name} --extend-epochs N trains it further"
    if ended.get("max_minutes") is not None:
        further = f"a larger train.max_minutes resumes it, and {further}"
    return f"run {run.name} is complete, {ended.get('why')}; {further}"


def _check_names_of_modules(config: Config) -> None:
    """Raises UserError if a name in `train.freeze` or `optim.lr_factors` is that of no module."""
    if config.train.freeze or config.optim.lr_factors:
        with torch.device("meta"):
            check_names(config, build_model(config.model))


def _check_registered_name(config: Config, data: DataSummary, console: Console) -> None:
    """Says before the training under which name another data set than the recipe's is registered.

    Raises:
        UserError: a registered model cannot have that name.
    """
    if not config.registry.register_best:
        return
    name = check_model_name(config.registered_name(data.dataset))
    if name != config.registered_name(config.registry.dataset or data.dataset):
        print_line(
            console,
            f"recipe {config.recipe} was written for data set {config.registry.dataset}; on {data.dataset} the network "
            f"is registered as {name} (registry.name sets another name)",
        )


def _processes(config: Config, options: Options) -> AbstractContextManager[None]:
    """The Ray session of a run, connected before anything is written, so that an error leaves no files."""
    if config.cluster.workers == 0:
        return nullcontext()
    quiet_ray()
    from spikefleet.cluster.ray_train import session_for  # imports Ray, which reads its environment variables

    return session_for(config, options.address, options.verbose)


def _train_tracked(
    config: Config,
    options: Options,
    console: Console,
    run: Run,
    store: Store,
    tracking_uri: str,
    before_step: BeforeStep | None,
    signals: StopSignals,
) -> str:
    """Trains with tracking, saves the result in run.json, and returns where to look at it."""
    run.note(status="running", signal=None, waiting=None)
    print_line(console, f"run {run.name}: {_scale(config)}")
    experiment = config.tracking.experiment or config.recipe
    tracker = Tracker.open(run.path, run.name, experiment, tracking_uri, options.parent_run)
    display = LoggedDisplay(build_display(console), run.path)
    display.say(f"run {run.name}: {_scale(config)}")
    observer = RunObserver(run, tracker, display)
    data = DataSummary.of(store.manifest)
    observer.begin(config, dataset_of(data, store.absolute_location, split_sizes(store.manifest)))
    display.announce("starting Ray workers" if config.cluster.workers else "starting")
    try:
        outcome = _train(config, store, run, ResumedRunSink(run.path, observer), options, before_step, signals)
        certificates = _certified(config, run, store, display.announce)
        _mirror_report(config, run, console)
        display.announce("tracking the report")
        observer.finish(outcome, certificates, config)
    except KeyboardInterrupt as error:
        run.note(status="interrupted", signal=interruption(error).name, waiting=None)
        display.say(f"interrupted by {interruption(error).name}; the same command resumes from the last checkpoint")
        tracker.finish("KILLED", wait_s=_INTERRUPTED_FLUSH_S)
        raise
    except Exception as error:
        with suppress(OSError):  # a full disk has been the reason
            run.note(status="failed", reason=disk_problem(error) or str(error), waiting=None)
        display.say(f"failed: {disk_problem(error) or error}")
        tracker.set_tags({"failure": str(error)})
        tracker.finish("FAILED", wait_s=_FLUSH_S)
        raise
    finally:
        display.close()
    with waiting(console, "delivering records to MLflow"):
        tracker.finish("FINISHED", wait_s=_FLUSH_S)
    run.note(
        status="finished",
        reason=None,
        validation=dict(outcome.validation),
        test=dict(outcome.test),
        last=dict(outcome.last),
        ended=end_of(outcome, config),
    )
    display.say("trained to the end" if outcome.ended is None else outcome.ended.why)
    return tracker.run_url


def _refuse_mirror_of_another(uri: str, run: Run) -> None:
    """Raises UserError for a mirror that cannot be one, or that another run writes, before anything is started."""
    mirror = Mirror(uri, run.name)
    with suppress(OSError):  # the hosts of the workers may have an access that this machine lacks
        refuse_other(mirror.owner(), Owner.of(run.path), mirror.where, empty=run.checkpoints.latest() is None)


def _mirror_report(config: Config, run: Run, console: Console) -> None:
    """Copies the report to `checkpoint.mirror`; a mirror that does not take it is named, and fails no run."""
    if config.checkpoint.mirror is None:
        return
    try:
        mirror = Mirror(config.checkpoint.mirror, run.name)
        refuse_other(mirror.owner(), Owner.of(run.path), mirror.where, empty=False)
        mirror.keep_report(run.path / "report")
    except Exception as error:  # file systems of clouds raise more than OSError
        print_line(console, f"checkpoint.mirror={config.checkpoint.mirror} did not take the report: {error}")


def _register_once(
    config: Config, run: Run, store: Store, tracking_uri: str, options: Options, announce: Announce
) -> Promotion | None:
    """Registers a finished run once, if `registry.register_best` says so, and promotes it.

    Raises:
        RunError: the tracking server does not answer; the run is complete, and the same command registers it later.
    """
    record = run.record()
    if not config.registry.register_best or record.get("registered"):
        return None
    try:
        sync(run.path, tracking_uri)
        with closing(Journal(run.path)) as journal:
            run_id = journal.delivered.run_id
        assert run_id is not None, "all records are delivered, so the run has been created"
        certificates = _certified(config, run, store, announce)
        evaluation = complete_report(config, run.best_checkpoint(), run.path / "report", store, announce)
        announce("registering the best checkpoint")
        version = register_run(
            config,
            run,
            run_id,
            tracking_uri,
            store=store,
            certificates=certificates,
            evaluation=evaluation,
            validation=record["validation"],
            test=record["test"],
        )
        announce("promoting")
        if options.promote:
            promotion = promote_version(
                config,
                version,
                store,
                options.stores_dir,
                tracking_uri,
                announce,
                validation=bool(record["validation"]),
            )
        else:
            promotion = keep_back(version, tracking_uri, announce)
        sentence = registration_sentence(promotion.name, promotion.version, promotion.alias, promotion.reason)
        text = finished_description(config, run, certificates, record["validation"], record["test"], sentence)
        annotate(run.path, {NOTE: text})
        sync(run.path, tracking_uri)
    except UserError as error:
        raise RunError(
            f"run {run.name} is trained, but its registration failed: {error}; "
            "fix that and run the same command again to register it"
        ) from error
    run.note(registered=f"{promotion.name}/{promotion.version}")
    return promotion


def _certified(config: Config, run: Run, store: Store, announce: Announce) -> Certificates:
    return certify(config, run.best_checkpoint(), run.path / "report", store, announce)


def _train(
    config: Config,
    store: Store,
    run: Run,
    sink: EventSink,
    options: Options,
    before_step: BeforeStep | None,
    signals: StopSignals,
) -> Outcome:
    if config.cluster.workers == 0:
        group = ProcessGroup.single(config.cluster.gpu)
        try:
            with signals.after_a_step():
                return train(config, store, run.path, group, sink, before_step, signals.requested)
        except TrainingStopped:
            assert signals.received is not None, "nobody else asks to stop"
            raise Interrupted(signals.received) from None
    from spikefleet.cluster.ray_train import train_on_ray

    threading.Thread(target=_import_ahead, name="imports", daemon=True).start()
    return train_on_ray(
        config,
        store,
        run.path,
        sink,
        address=options.address,
        verbose=options.verbose,
        before_step=before_step,
        signals=signals,
    )


def _import_ahead() -> None:
    """Imports what certifying and plotting need, 2 s of processor time, while the workers start.

    Torch imports its compiler when it counts a network on its meta device, though nothing is compiled.
    """
    for module in ("torch._dynamo", "matplotlib.pyplot"):
        importlib.import_module(module)


def _scale(config: Config) -> str:
    cluster = config.cluster
    where = cluster.shown_workers("Ray Train worker") if cluster.workers else "in this process, without Ray,"
    kind = "GPU" if config.cluster.gpu else "CPU"
    share = config.train.global_batch // (cluster.most_workers * config.train.accumulate)
    parts = f" x {config.train.accumulate} micro-batches" if config.train.accumulate > 1 else ""
    changes = "; the number follows the hosts, so the run is not repeatable bit for bit" if cluster.elastic else ""
    whole = f"global batch {config.train.global_batch} = {share} x {cluster.most_workers}{parts}"
    return f"{where} on {kind}; {whole}{changes}"
