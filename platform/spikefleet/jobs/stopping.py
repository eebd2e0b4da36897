"""Stops a run with a checkpoint: a job of a cluster, or a process of this machine."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import time
import uuid

from spikefleet.errors import RunError, UserError
from spikefleet.files import read_json_object
from spikefleet.jobs.server import Job, JobServer
from spikefleet.runs.run_dir import Run
from spikefleet.status import Announce
from spikefleet_tune.lock import holder_of

_MARGIN_S = 30.0
"""Beyond `cluster.grace_s`: a training may first have to end an evaluation, and deliver records for some seconds."""
_NOW_S = 5.0
_HELPER_S = 60.0
_LOOK_S = 0.2


def stop_job(server: JobServer, job: Job, *, now: bool, grace_s: float, announce: Announce) -> Job:
    """Stops a job: its command gets SIGTERM and ends with a checkpoint; what has not ended in time is killed.

    Args:
        server: of the cluster.
        job: to stop.
        now: kill it at once.
        grace_s: seconds for the checkpoint.
        announce: names what is waited for.

    Returns:
        the job as it ended.

    Raises:
        RunError: it did not end, or was deleted meanwhile.
    """
    if not job.alive:
        return job
    if not now:
        announce(f"asking {job.id} for a checkpoint")
        if _signal_driver(server, job):
            announce(f"{job.id} ends its step")
            if (ended := _ended(server, job, grace_s + _MARGIN_S)) is not None:
                return ended
    announce(f"killing {job.id}")
    server.kill(job.id)
    if (ended := _ended(server, job, _HELPER_S)) is None:
        raise RunError(f"job {job.id} of {server.address} did not end within {_HELPER_S:.0f} s; stop it again")
    return ended


def _ended(server: JobServer, job: Job, seconds: float) -> Job | None:
    """The job as it ended; None if it has not in time. Raises RunError if the cluster no longer knows it."""
    ended = server.ended(job.id, seconds)
    if ended is None and server.get(job.id) is None:
        raise RunError(f"job {job.id} of {server.address} is gone: it ended and was deleted, or the cluster ended")
    return ended


def _signal_driver(server: JobServer, job: Job) -> bool:
    """Sends SIGTERM to the command of a job, by a job that runs beside it; whether it was sent."""
    helper = f"stop-{uuid.uuid4().hex[:12]}"
    words = ["python", "-m", "spikefleet.jobs.signal_driver", job.id]
    server.submit(helper, shlex.join(words), {})
    ended = server.ended(helper, _HELPER_S)
    if ended is None:
        server.kill(helper)
        return False
    server.forget(helper)
    return ended.state == "finished"


def stop_run(run: Run, *, now: bool, announce: Announce) -> str:
    """Stops a run of this machine: SIGTERM, and SIGKILL for what has not ended within its grace.

    Args:
        run: to stop.
        now: kill it after a few seconds.
        announce: names what is waited for.

    Returns:
        what became of it, as a sentence.

    Raises:
        UserError: the run is trained on another host, or by another user.
    """
    lock = run.path / ".lock"
    if (holder := holder_of(lock)) is None:
        return f"run {run.name} is not running"
    found = re.fullmatch(r"process (\d+) on (\S+)", holder)
    if found is None or found[2] != socket.gethostname():
        raise UserError(
            f"run {run.name} is trained elsewhere ({holder}); stop it there, or by --address if it was submitted"
        )
    process = int(found[1])
    announce(f"run {run.name}: process {process} ends its step")
    _send(process, signal.SIGTERM, run)
    deadline = time.monotonic() + (_NOW_S if now else _grace_s(run) + _MARGIN_S)
    while holder_of(lock) == holder:
        if time.monotonic() > deadline:
            _send(process, signal.SIGKILL, run)
            return f"run {run.name} was killed: process {process} did not end in time; it resumes from its checkpoint"
        time.sleep(_LOOK_S)
    latest = run.checkpoints.latest()
    where = "no checkpoint was saved yet" if latest is None else f"it resumes from {latest.name}"
    return f"run {run.name} has stopped; {where}"


def _send(process: int, sent: signal.Signals, run: Run) -> None:
    """Sends a signal to the process of a run. Raises UserError if it is another user's."""
    try:
        os.kill(process, sent)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise UserError(
            f"run {run.name} is trained by process {process} of another user; stop it as that user"
        ) from None


def _grace_s(run: Run) -> float:
    cluster = read_json_object(run.path / "config.json").get("cluster")
    grace = cluster.get("grace_s") if isinstance(cluster, dict) else None
    return float(grace) if isinstance(grace, int | float) else 30.0
