"""Ranks of the training core over gloo, with planned faults and restarts, and without Ray.

A server process imports torch and the training core once, and each rank is forked from it, in a fraction of a second.
A group of ranks ends and starts again as Ray Train would have it: the death of one rank ends the others, and the next
group resumes from the latest checkpoint. What no restart can heal (a loss that is not finite, a sentence for the user)
ends the run.

    run = run_ranks(config, store, run_dir, [kill(rank=1, step=7), freeze(rank=0, step=9, wakes=True)])
    assert run.restarts == 1
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from spikefleet.config.recipes import parse_config
from spikefleet.config.schema import Config
from spikefleet.errors import RunError, UserError
from spikefleet.training.event_log import EventReader, EventWriter, new_attempt
from spikefleet.training.events import Event, NullSink, StepDone
from support.figures import draw_nothing

SERVER = multiprocessing.get_context("forkserver")
"""Forks processes that have imported torch."""
SERVER.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",  # DDP asks for it
        "pandas",  # pyarrow asks for it
        "mlflow",  # what a command that trains asks for, with the next two
        "matplotlib.pyplot",
        "spikefleet.runs.train_run",
        "spikefleet.cli",
        "spikefleet.training.loop",
        "spikefleet.tasks.classification",
        "spikefleet_models.sg_resnet",
        "spikefleet_pipelines.transforms.classification",
    ]
)
_GROUP_S = 200.0
"""Seconds after which a group is given up."""
_FAREWELL_S = 20.0
"""Seconds that the other ranks have to raise what they raise when one rank has ended by an exception."""
_FROZEN_S = 1.0
"""Seconds for which a frozen rank stands still."""


@dataclass(frozen=True)
class Fault:
    """What befalls one rank, once, before one step. The step is the number of optimizer steps done."""

    rank: int
    step: int
    strike: Callable[[Path], None]
    """Called in the rank, with the file that marks that the fault has fired."""
    thaw: signal.Signals | None = None
    """What a rank that stands still is sent in the end."""


def kill(rank: int, step: int) -> Fault:
    """The rank is gone at once: SIGKILL."""
    return Fault(rank, step, _die)


def leave(rank: int, step: int) -> Fault:
    """The rank's process exits with code 9, without a word."""
    return Fault(rank, step, _leave)


def freeze(rank: int, step: int, *, wakes: bool) -> Fault:
    """The whole process stands still for a second; then it goes on, or is killed."""
    return Fault(rank, step, _stand_still, signal.SIGCONT if wakes else signal.SIGKILL)


def poison_loss(rank: int, step: int) -> Fault:
    """The rank's loss is NaN from this step on."""
    return Fault(rank, step, _poison_loss)


def fail(rank: int, step: int, error: Exception) -> Fault:
    """The rank alone raises an exception, while the others wait for its gradients."""
    return Fault(rank, step, _Raise(error))


def ask_to_stop(rank: int, step: int) -> Fault:
    """The run is asked to stop while the rank is about to take a step; the next group resumes it."""
    return Fault(rank, step, _ask)


def _ask(mark: Path) -> None:
    _asked(mark).touch()


def _asked(mark: Path) -> Path:
    return mark.with_name(f"{mark.name}-asked")


@dataclass(frozen=True)
class _Raise:
    error: Exception

    def __call__(self, mark: Path) -> None:
        raise self.error


def _die(mark: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(mark: Path) -> None:
    os._exit(9)


def _stand_still(mark: Path) -> None:
    while not _released(mark).exists():  # meanwhile the process is stopped from outside
        time.sleep(0.01)


def _released(mark: Path) -> Path:
    return mark.with_name(f"{mark.name}-released")


def _poison_loss(mark: Path) -> None:
    from spikefleet.tasks.classification import Classification

    healthy = Classification.loss

    def poisoned(self: Any, *arguments: Any) -> dict[str, Any]:
        values = healthy(self, *arguments)
        return {**values, "loss": values["loss"] * float("nan")}

    Classification.loss = poisoned  # type: ignore[assignment, method-assign]


@dataclass
class GroupRun:
    """What came of a run: of all groups that were started for it, one after the other."""

    events: list[Event] = field(default_factory=list)
    exit_codes: list[list[int | None]] = field(default_factory=list)
    """By group and rank; a negative one is a signal's number."""
    outcomes: list[Any] = field(default_factory=list)
    """What `train` returned in each rank of the last group, None where it did not return."""
    errors: list[Exception | None] = field(default_factory=list)
    """What `train` raised in each rank of the last group."""
    log: str = ""
    """What the ranks of the last group wrote to standard error."""

    @property
    def restarts(self) -> int:
        return len(self.exit_codes) - 1

    @property
    def finished(self) -> bool:
        return all(code == 0 for code in self.exit_codes[-1])

    @property
    def losses(self) -> dict[int, float]:
        """The loss of each step, as last reported."""
        return {event.step: event.metrics["train/loss"] for event in self.events if isinstance(event, StepDone)}


def run_ranks(
    config: Config,
    store: Path,
    run_dir: Path,
    faults: Sequence[Fault] = (),
    *,
    max_failures: int = 20,
    sizes: Sequence[int] = (),
    prepare: Callable[[], None] | None = None,
) -> GroupRun:
    """Trains in `config.cluster.workers` ranks, which restart after a failure, to the end or to what none can heal.

    The figures of the run's report are not drawn.

    Args:
        config: the same for all ranks.
        store: directory of the data.
        run_dir: where checkpoints are; a run that is there already is resumed.
        faults: each must come to pass, whatever else happens.
        max_failures: failures after which no other group is started, less one.
        sizes: ranks of each group, the last one of all that follow; by default `config.cluster.workers`.
        prepare: a function of a module, called in each rank before it trains.

    Raises:
        AssertionError: a planned fault did not fire.
        TimeoutError: a group does not end.
    """
    planned = [
        (fault, run_dir.with_name(f"{run_dir.name}-fault-{time.time_ns()}-{n}")) for n, fault in enumerate(faults)
    ]
    run = GroupRun()
    while True:
        attempt = new_attempt(run_dir)
        size = sizes[min(len(run.exit_codes), len(sizes) - 1)] if sizes else config.cluster.most_workers
        arguments = (size, config.dump(), store, run_dir, attempt, planned, prepare)
        ranks: list[BaseProcess] = [SERVER.Process(target=_rank, args=(rank, *arguments)) for rank in range(size)]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, planned, attempt)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        run.exit_codes.append([process.exitcode for process in ranks])
        run.events += EventReader(attempt).new()
        run.outcomes = [_left(attempt / f"outcome-{rank}") for rank in range(size)]
        run.errors = [_left(attempt / f"error-{rank}") for rank in range(size)]
        run.log = _logs(attempt)
        healable = not any(isinstance(error, UserError | RunError) for error in run.errors)
        if run.finished or not healable or run.restarts == max_failures:
            break
    unfired = [f"rank {fault.rank} at step {fault.step}" for fault, mark in planned if not mark.exists()]
    assert not unfired, f"planned faults did not fire: {unfired}\n{run.log}"
    return run


def run_undisturbed(config: Config, store: Path, run_dir: Path, prepare: Callable[[], None] | None = None) -> GroupRun:
    """As `run_ranks`, of a run in which no rank fails and nothing restarts."""
    run = run_ranks(config, store, run_dir, prepare=prepare)
    assert run.exit_codes == [[0] * config.cluster.most_workers], run.log
    return run


def _left(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _leave_behind(path: Path, value: object) -> None:
    """Whole or not at all: the group may be killed while a rank writes."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(pickle.dumps(value))
    unfinished.replace(path)


def _logs(attempt: Path) -> str:
    return "".join(f"{path.name}:\n{path.read_text()}" for path in sorted(attempt.glob("rank-*.log")))


def _wait(ranks: Sequence[BaseProcess], planned: Sequence[tuple[Fault, Path]], attempt: Path) -> None:
    """Returns when all ranks have ended, one was killed, or one has failed and the others had time to fail too."""
    frozen = [(fault, mark) for fault, mark in planned if fault.thaw is not None and not mark.exists()]
    deadline = time.monotonic() + _GROUP_S
    while running := [process for process in ranks if process.exitcode is None]:
        connection.wait([process.sentinel for process in running], timeout=0.1)
        codes = [process.exitcode for process in ranks if process.exitcode is not None]
        if any(code < 0 for code in codes):
            return
        for fault, mark in [pair for pair in frozen if pair[1].exists()]:
            frozen.remove((fault, mark))
            _freeze_for_a_while(ranks, fault, mark)
        if any(codes):
            deadline = min(deadline, time.monotonic() + _FAREWELL_S)
        if time.monotonic() > deadline:
            if any(codes):
                return
            raise TimeoutError(f"the ranks have not ended within {_GROUP_S:g} s\n{_logs(attempt)}")


def _freeze_for_a_while(ranks: Sequence[BaseProcess], fault: Fault, mark: Path) -> None:
    pid = ranks[fault.rank].pid
    assert pid is not None
    assert fault.thaw is not None
    os.kill(pid, signal.SIGSTOP)
    time.sleep(_FROZEN_S)
    assert all(process.is_alive() for process in ranks), "a rank has not waited for the one that stands still"
    _released(mark).touch()
    os.kill(pid, fault.thaw)


def _rank(
    rank: int,
    size: int,
    config: dict[str, Any],
    store: Path,
    run_dir: Path,
    attempt: Path,
    planned: Sequence[tuple[Fault, Path]],
    prepare: Callable[[], None] | None,
) -> None:
    import torch
    from torch import distributed as dist

    from spikefleet.training.distributed import ProcessGroup
    from spikefleet.training.loop import train
    from spikefleet.training.stopping import TrainingStopped
    from spikefleet_pipelines.store.reader import Store

    def before_step(group: ProcessGroup, step: int) -> None:
        for fault, mark in planned:
            if (fault.rank, fault.step) == (rank, step) and not mark.exists():
                mark.touch()
                fault.strike(mark)

    def stop_requested() -> bool:
        return any(_asked(mark).exists() for _, mark in planned)

    with (attempt / f"rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    draw_nothing()
    dist.init_process_group("gloo", init_method=f"file://{attempt}/rendezvous", rank=rank, world_size=size)
    group = ProcessGroup(rank, size, torch.device("cpu"))
    if prepare is not None:
        prepare()
    try:
        outcome = train(
            parse_config(config, origin="the test"),
            Store.open(store, verify=False),
            run_dir,
            group,
            EventWriter(attempt) if group.is_main else NullSink(),
            before_step,
            stop_requested,
        )
    except Exception as error:
        if isinstance(error, TrainingStopped):
            dist.barrier()  # all ranks have agreed
            for _, mark in planned:
                _asked(mark).unlink(missing_ok=True)
        _leave_behind(attempt / f"error-{rank}", error)
        raise
    _leave_behind(attempt / f"outcome-{rank}", outcome)
    dist.destroy_process_group()
