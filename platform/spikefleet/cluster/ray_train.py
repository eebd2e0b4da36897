"""The training core on Ray Train V2: workers, their restart after a failure, and their events to the driver."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

from spikefleet.cluster.failure_notes import FailureNotes
from spikefleet.cluster.failures import cause_of, headline
from spikefleet.cluster.following import POLL_S, followed
from spikefleet.cluster.group_size import GroupSize, WorkersFailed, needed_by
from spikefleet.cluster.host_watch import NODE, HostWatch
from spikefleet.cluster.session import ray_session
from spikefleet.cluster.watched_sink import WatchedSink
from spikefleet.cluster.worker_arguments import WorkerArguments
from spikefleet.config.cluster_config import ClusterConfig
from spikefleet.config.recipes import parse_config
from spikefleet.config.schema import Config
from spikefleet.errors import RunError, UserError
from spikefleet.files import read_json_object, write_json
from spikefleet.plugins import load_plugins, loaded_plugins
from spikefleet.stop_signals import StopSignals
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.event_log import STOPPED, TAKEN_OVER, EventWriter, new_attempt
from spikefleet.training.events import EventSink, NullSink
from spikefleet.training.loop import BeforeStep, Outcome, train
from spikefleet.training.step_reading import NonFiniteError
from spikefleet.training.stopping import STOP, TrainingStopped
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.interruption import Interrupted, handlers_kept

_CONTROLLER_S = 5.0


def _no_signal() -> None:
    """A run that is no trial."""


class _GroupTrainer(TorchTrainer):
    """Without Ray Data: with each group Ray Train would start a process for its sets, and stores are read from disk."""

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]


@dataclass(frozen=True)
class Stopped:
    """Why training stopped early with an error that a restart cannot fix."""

    reason: str
    mendable: bool
    """Whether the user can fix it: exit code 2 instead of 1."""
    non_finite: bool = False
    """Whether a loss or a gradient was not finite."""
    step: int | None = None
    """The last step, if the driver had asked for it."""

    @property
    def asked(self) -> bool:
        """Whether the driver had asked for it."""
        return self.step is not None

    def error(self) -> UserError | RunError:
        """The exception to raise in the driver, unless it had asked for it."""
        if self.non_finite:
            return NonFiniteError(self.reason)
        return (UserError if self.mendable else RunError)(self.reason)


def session_for(config: Config, address: str | None, verbose: bool) -> AbstractContextManager[None]:
    """A Ray session with the resources that a configuration needs.

    Args:
        config: of the run.
        address: HOST:PORT of the cluster; by default RAY_ADDRESS, else a local Ray is started.
        verbose: show the logs of Ray and of its workers.

    Raises:
        UserError: nothing answers at the address, or the cluster has too few CPUs or GPUs.
    """
    needed = needed_by(config.cluster, config.cluster.least_workers)
    if config.cluster.autoscaling and (address or os.environ.get("RAY_ADDRESS")):
        needed = {"CPU": 0, "GPU": 0}
    return ray_session(address, cpus=needed["CPU"], gpus=needed["GPU"], verbose=verbose)


def train_on_ray(
    config: Config,
    store: Store,
    run_dir: Path,
    sink: EventSink,
    *,
    address: str | None = None,
    verbose: bool = False,
    before_step: BeforeStep | None = None,
    lockstep: bool = False,
    signals: StopSignals | None = None,
    stop_signal: Callable[[], str | None] = _no_signal,
) -> Outcome:
    """Runs the training core on `config.cluster.workers` workers.

    A failed worker restarts the group from the latest committed checkpoint, up to `config.cluster.max_failures` times;
    with a range of workers at the size that the hosts have places for.

    Args:
        config: of the run.
        store: its data.
        run_dir: the run's directory, on storage that all nodes share.
        sink: receives the events of the workers.
        address: HOST:PORT of the cluster; by default RAY_ADDRESS, else a local Ray is started.
        verbose: show the logs of Ray and of its workers.
        before_step: called on each rank before each optimizer step.
        lockstep: workers wait after each checkpoint until the sink has handled its event; searches need it.
        signals: of the driver; the first one stops the workers after a step.
        stop_signal: for a trial of a search, which gets no signals itself: the name of the one that its search got.

    Returns:
        The outcome of the training.

    Raises:
        Interrupted: a signal stopped the training; the workers had `cluster.grace_s` seconds for a checkpoint.
        TrainingStopped: `stop_signal` stopped it, after a checkpoint.
        RunError: the workers failed too often, or Ray lost the run.
        UserError: Ray cannot be reached, or the workers reported an error of the user.
    """
    with session_for(config, address, verbose), _requested(config.cluster):
        least, one = (needed_by(config.cluster, workers) for workers in (config.cluster.least_workers, 1))
        hosts = HostWatch(least, config.cluster.wait_minutes, sink, one)
        if not config.cluster.autoscaling and (lacking := hosts.too_small) is not None:
            raise UserError(
                f"the run needs {lacking}; lower cluster.cpus_per_worker or --workers, set --address to a cluster of "
                "larger hosts, or cluster.autoscaling=true where such hosts will join"
            )
        watched, sizes = WatchedSink(sink, hosts, run_dir.name), GroupSize(config.cluster, hosts, sink)
        while True:
            sizes.choose()
            attempt = new_attempt(run_dir)
            watched.attempt = attempt
            arguments = WorkerArguments(
                config.dump(),
                store.absolute_location,
                str(run_dir),
                str(attempt),
                before_step,
                lockstep,
                loaded_plugins(),
            )
            trainer = _trainer(config.cluster, sizes, arguments, attempt)
            try:
                with followed(attempt, watched, sizes, lockstep, stop_signal) as following:
                    if signals is None:
                        outcome = _fit(trainer)
                    else:
                        outcome = _fit_stoppable(trainer, attempt, watched, sizes, signals, config.cluster)
            except WorkersFailed as error:
                if signals is not None and signals.received is not None:
                    raise
                sizes.failed(error)
                continue
            except _TooLarge:
                continue
            finally:
                shutil.rmtree(attempt, ignore_errors=True)
            asked = isinstance(outcome, Stopped) and outcome.asked
            signalled = (signals is not None and signals.received is not None) or stop_signal() is not None
            if not (asked and following.goes_on and not signalled):
                break
            watched.stopped_for(following.leaving)
    if isinstance(outcome, Stopped):
        if outcome.step is not None:
            if signals is not None and signals.received is not None:
                raise Interrupted(signals.received)
            raise TrainingStopped(outcome.step)
        raise outcome.error()
    return outcome


@contextmanager
def _requested(cluster: ClusterConfig) -> Iterator[None]:
    """Asks the autoscaler of a cluster that grows for what the workers need, for the length of the block."""
    if not cluster.autoscaling:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    worker = {"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.gpu else {})}
    request_resources(bundles=[worker] * cluster.most_workers)
    try:
        yield
    finally:
        with suppress(Exception):  # a cluster that is gone needs no release
            request_resources(bundles=[])


def _trainer(cluster: ClusterConfig, sizes: GroupSize, arguments: WorkerArguments, attempt: Path) -> TorchTrainer:
    return _GroupTrainer(
        _worker,
        train_loop_config={"arguments": arguments},
        torch_config=TorchConfig(backend="nccl" if cluster.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=sizes.size,
            use_gpu=cluster.gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.gpu else {})},
        ),
        run_config=RunConfig(
            # Ray's own record of the attempt; a run resumes from spikefleet's checkpoints.
            name=attempt.name,
            storage_path=str(attempt.parent),
            failure_config=FailureConfig(max_failures=sizes.max_failures),
            callbacks=[FailureNotes(attempt)],
        ),
    )


def _worker(loop_config: dict[str, Any]) -> Outcome | Stopped:
    """The training function of a Ray Train worker.

    A worker saves an error that a restart cannot fix before it fails; the group that Ray restarts only reads it.
    """
    arguments: WorkerArguments = loop_config["arguments"]
    context = ray.train.get_context()
    group = ProcessGroup(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    if group.device.type == "cuda":
        torch.cuda.set_device(group.device)
    attempt = Path(arguments.attempt)
    stopped = attempt / STOPPED
    if stopped.is_file():
        return _read_stopped(stopped)
    sink: EventSink = EventWriter(attempt, arguments.lockstep) if group.is_main else NullSink()

    def before_step(group: ProcessGroup, step: int) -> None:
        # Workers may outlive their killed driver; the next driver removes their attempt when it starts.
        if group.is_main and not attempt.is_dir():
            raise RunError(TAKEN_OVER)
        if group.is_main and stopped.is_file():
            raise _read_stopped(stopped).error()
        if arguments.before_step is not None:
            arguments.before_step(group, step)

    try:
        (attempt / f"{NODE}{group.rank}").write_text(ray.get_runtime_context().get_node_id())
        load_plugins(arguments.plugins)
        config = parse_config(arguments.config, origin="configuration of the run")
        store = Store.open(arguments.store, verify=False)  # the driver has verified it
        stop = attempt / STOP
        return train(config, store, Path(arguments.run_dir), group, sink, before_step, stop.is_file)
    except TrainingStopped as error:
        # All ranks raise it together, so returning ends the group.
        return Stopped(str(error), mendable=False, step=error.step)
    except NonFiniteError as error:
        return Stopped(str(error), mendable=False, non_finite=True)
    except (UserError, StoreError, RunError) as error:
        with suppress(OSError):
            stopped.parent.mkdir(parents=True, exist_ok=True)
            write_json(stopped, {"reason": str(error), "mendable": not isinstance(error, RunError)})
        raise


class _TooLarge(Exception):  # noqa: N818  # a group of another size follows
    """The hosts that a group waits for are gone, and it may be smaller."""


def _fit_stoppable(
    trainer: TorchTrainer,
    attempt: Path,
    watched: WatchedSink,
    sizes: GroupSize,
    signals: StopSignals,
    cluster: ClusterConfig,
) -> Outcome | Stopped:
    """Trains in another thread, so that this one handles signals at once: Ray's calls do not return for them.

    Raises:
        RunError: the run has waited for hosts for longer than `cluster.wait_minutes`.
        Interrupted: a second signal arrived, the workers did not end their step within `cluster.grace_s`, or they were
            not training.
        _TooLarge: the group waits for hosts without which it could be smaller.
    """
    done: Future[Outcome | Stopped] = Future()

    def fit() -> None:
        try:
            done.set_result(_fit(trainer))
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)  # an abort does not wait for it
    with signals.after_a_step():
        thread.start()
        asked: float | None = None
        while not done.done():
            thread.join(POLL_S)
            if sizes.too_large and thread.is_alive():
                _end_controller(thread)
                raise _TooLarge
            if not sizes.may_shrink and (sentence := watched.hosts.overdue) is not None and thread.is_alive():
                _end_controller(thread)
                raise RunError(sentence)
            if not signals.requested() or signals.received is None:
                continue
            if asked is None:
                asked = time.monotonic()
                with suppress(OSError):
                    write_json(attempt / STOP, {"signal": signal.Signals(signals.received).name})
            overdue = not watched.training or time.monotonic() - asked > cluster.grace_s
            if overdue and thread.is_alive():
                _end_controller(thread)
                raise Interrupted(signals.received)
    return done.result()


def _end_controller(thread: threading.Thread) -> None:
    """Ends Ray Train's controller, and so the thread that waits for it: to leave Ray meanwhile crashes the process.

    The controller's handle is a local variable of `DataParallelTrainer._initialize_and_run_controller`.
    """
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "_initialize_and_run_controller" and "controller" in frame.f_locals:
            with suppress(RayError, ValueError):
                ray.kill(frame.f_locals["controller"])
        frame = frame.f_back
    thread.join(_CONTROLLER_S)


def _read_stopped(path: Path) -> Stopped:
    try:
        return Stopped(**read_json_object(path, "reason", "mendable"))
    except (UserError, TypeError) as error:
        return Stopped(f"the reason why the run was stopped cannot be read: {error}", mendable=False)


def _fit(trainer: TorchTrainer) -> Outcome | Stopped:
    try:
        with handlers_kept():  # fit does not restore them
            result = trainer.fit()
    except SystemExit:
        # Ray's handler of Ctrl-C stops the workers, then exits with code 0.
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        cause = cause_of(error)
        if isinstance(cause, UserError | RunError):
            raise cause from None
        if isinstance(cause, StoreError):
            raise UserError(str(cause)) from None
        raise WorkersFailed(
            f"the workers failed more often than cluster.max_failures allows: {headline(cause)}; run the same command "
            "again to resume"
        ) from error
    except RayError as error:
        raise RunError(f"Ray lost the run: {headline(error)}; run the same command again to resume") from error
    outcome: Outcome | Stopped = result.return_value
    return outcome
