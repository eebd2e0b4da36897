"""The training core on Ray Train V2: worker processes, their restart after a death, and their way to the driver."""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from spikefleet.config import Config, parse_config
from spikefleet.errors import RunError, UserError
from spikefleet.events import Event, Outlet, Restarted, Silence
from spikefleet.ray_session import ray_session
from spikefleet.worker import NonFiniteError, Outcome, train
from spikefleet.world import World
from spikefleet_pipelines.store import Store

_POLL_S = 0.2

BeforeStep = Callable[[World, int], None]


@ray.remote(num_cpus=0)
class EventRelay:
    """Holds events between the worker that sends them and the driver that draws them."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        self._events.append(event)

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class RelayOutlet:
    """Fire and forget, so that training never waits for the driver."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay

    def emit(self, event: Event) -> None:
        self._relay.put.remote(event)


class RestartNotes(UserCallback):
    """Runs in Ray Train's controller, where an exception would end the run: it only sends."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        reasons = {f"rank {rank}: {_headline(error)}" for rank, error in worker_exceptions.items()}
        self._relay.put.remote(Restarted("; ".join(sorted(reasons))))


@dataclass(frozen=True)
class WorkerArguments:
    """What a worker gets from the driver, in a form that any node can read."""

    config: dict[str, Any]
    store: str
    run_dir: str
    relay: Any
    before_step: BeforeStep | None


def train_on_ray(
    config: Config,
    store: Store,
    run_dir: Path,
    outlet: Outlet,
    *,
    address: str | None = None,
    verbose: bool = False,
    before_step: BeforeStep | None = None,
) -> Outcome:
    """Runs the training core on `config.cluster.workers` workers.

    A dead worker restarts the group from the latest committed checkpoint, `config.cluster.max_failures` times.
    Raises RunError when that does not help, and UserError when Ray cannot be reached.
    """
    cluster = config.cluster
    with ray_session(address, cpus=cluster.workers * cluster.cpus_per_worker, verbose=verbose):
        relay = EventRelay.remote()  # type: ignore[attr-defined]
        arguments = WorkerArguments(config.dump(), _anywhere(store.location), str(run_dir), relay, before_step)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"arguments": arguments},
            torch_config=TorchConfig(backend="nccl" if cluster.gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=cluster.workers,
                use_gpu=cluster.gpu,
                resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.gpu else {})},
            ),
            run_config=RunConfig(
                # Ray's own record of a launch; what a run resumes from are spikefleet's checkpoints.
                name=f"launch-{uuid.uuid4().hex[:12]}",
                storage_path=str(run_dir / "ray"),
                failure_config=FailureConfig(max_failures=cluster.max_failures),
                callbacks=[RestartNotes(relay)],
            ),
        )
        with _pumped(relay, outlet):
            outcome = _fit(trainer)
    if outcome.failure is not None:
        raise RunError(outcome.failure)
    return outcome


def _anywhere(location: str) -> str:
    """A local path made absolute: workers have other working directories. URIs stay."""
    return location if "://" in location else str(Path(location).absolute())


def _worker(loop_config: dict[str, Any]) -> Outcome:
    """The body of a Ray Train worker."""
    arguments: WorkerArguments = loop_config["arguments"]
    config = parse_config(arguments.config, origin="configuration of the run")
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    outlet: Outlet = RelayOutlet(arguments.relay) if world.leads else Silence()
    store = Store.open(arguments.store, verify=False)  # the driver has verified it
    try:
        return train(config, store, Path(arguments.run_dir), world, outlet, arguments.before_step)
    except NonFiniteError as error:
        # All ranks stop here together, and would again: a restart could not help, so this is no failure of a worker.
        return Outcome(0, "", {}, {}, (), failure=str(error))


def _fit(trainer: TorchTrainer) -> Outcome:
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    handler = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except SystemExit:
        # Ray's handler of Ctrl-C ends the workers, then the program as if all were done.
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from None
        raise RunError(f"the workers failed more often than cluster.max_failures allows: {_headline(cause)}") from error
    except RayError as error:
        raise RunError(
            f"Ray lost the run: {_headline(error)}; the same command goes on from the last checkpoint"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # fit leaves its own behind
    outcome: Outcome = result.return_value
    return outcome


def _cause(error: BaseException) -> BaseException:
    """The first exception of a worker inside of Ray's wrappers."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error


def _headline(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _pumped(relay: Any, outlet: Outlet) -> Iterator[None]:
    """Moves events from the relay to the outlet while the block runs, and what is left when it ends."""
    done = threading.Event()

    def drain() -> None:
        for event in ray.get(relay.drain.remote()):
            outlet.emit(event)

    def pump() -> None:
        while not done.wait(_POLL_S):
            drain()

    thread = threading.Thread(target=pump, name="events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        drain()
