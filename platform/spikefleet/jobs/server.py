"""Ray's Jobs API at the head of a cluster, with one sentence for each way in which it does not answer."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from spikefleet.cluster.auth_token import check_token_is_there, refused_token
from spikefleet.cluster.session import quiet_ray
from spikefleet.errors import RunError, UserError
from spikefleet.jobs.submission import MARK

_CONNECT_TIMEOUT_S = 5.0
_LOOK_S = 0.5
_RETRY_S = 2.0
_PATIENCE = 30
"""Attempts to read on when a connection breaks while a log is followed."""

JobState = Literal["pending", "running", "finished", "failed", "stopped"]

_STATES: Mapping[str, JobState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "stopped",
}
_SIGNALLED = frozenset({130, 143})
"""Exit codes of a command that a signal has stopped, with a checkpoint."""


@dataclass(frozen=True)
class Job:
    """A job of ours, as the cluster knows it."""

    id: str
    """Its submission id."""
    state: JobState
    metadata: Mapping[str, str]
    entry_point: str
    exit_code: int | None
    """Of its command, once it has ended by itself."""
    message: str
    """What Ray says of its state."""
    started: float | None
    """Seconds since the epoch."""
    ended: float | None

    @property
    def kind(self) -> str:
        """The command."""
        return self.metadata.get("kind", "")

    @property
    def run(self) -> str:
        """What it works on."""
        return self.metadata.get("run", "")

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("pending", "running")


class _PassedOn:
    """Passes a log on that is read several times from its start, each part of it once.

    Args:
        write: receives it.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._seen = self.passed = 0

    def start_again(self) -> None:
        """The log is read from its start."""
        self._seen = 0

    def add(self, text: str) -> None:
        """Takes the next part that is read."""
        new = text[max(0, self.passed - self._seen) :]
        self._seen += len(text)
        self.passed = max(self.passed, self._seen)
        if new:
            self._write(new)


class JobServer:
    """The Jobs API of one cluster.

    Args:
        address: http://HOST:PORT of the head's dashboard, by default port 8265.

    Raises:
        UserError: the address has another form, nothing answers there, or the token is refused.
    """

    def __init__(self, address: str) -> None:
        self.address = _checked_address(address)
        check_token_is_there()
        quiet_ray()
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # connections that close
        with self._spoken():
            self._client = JobSubmissionClient(self.address)

    def jobs(self) -> list[Job]:
        """Jobs that spikefleet has submitted, the latest last."""
        with self._spoken():
            found = [_job(details) for details in self._client.list_jobs() if MARK in (details.metadata or {})]
        return sorted(found, key=lambda job: job.started or float("inf"))

    def find(self, name: str) -> Job:
        """The latest job of a run, or the one of this submission id.

        Raises:
            UserError: there is none, or several kinds of job have worked on a run of this name.
        """
        jobs = self.jobs()
        if named := [job for job in jobs if job.id == name]:
            return named[0]
        found = [job for job in jobs if job.run == name]
        alive = [job for job in found if job.alive]
        if len({job.kind for job in alive or found}) > 1:
            ids = ", ".join(job.id for job in alive or found)
            raise UserError(f"{name!r} names several jobs of {self.address}; give the submission id: {ids}")
        if not found:
            known = ", ".join(dict.fromkeys(job.run for job in jobs))
            listed = f"expected one of {known}" if known else "spikefleet has submitted none there"
            raise UserError(f"no job of {self.address} works on {name!r}; {listed}")
        return (alive or found)[-1]

    def get(self, submission: str) -> Job | None:
        """The job of a submission id; None if there is none."""
        with self._spoken():
            try:
                return _job(self._client.get_job_info(submission))
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    def submit(self, submission: str, entry_point: str, metadata: Mapping[str, str], code: Path | None = None) -> None:
        """Submits a job.

        Args:
            submission: its id, which no other job has.
            entry_point: its shell command.
            metadata: shown to everybody who has the token.
            code: directory whose files it gets as its working directory.
        """
        environment = {} if code is None else {"working_dir": str(code)}
        with self._spoken():
            self._client.submit_job(
                entrypoint=entry_point, submission_id=submission, metadata=dict(metadata), runtime_env=environment
            )

    def log(self, submission: str) -> str:
        """What a job has printed so far; empty while it has not started."""
        with self._spoken():
            return str(self._client.get_job_logs(submission))

    def follow(self, submission: str, write: Callable[[str], None]) -> Job:
        """Passes on what a job prints, from its first line on, until it has ended.

        A connection that breaks is opened again, and nothing is passed on twice.

        Returns:
            the job as it ended.
        """
        log, broken = _PassedOn(write), 0
        while True:
            before = log.passed
            try:
                asyncio.run(self._tail(submission, log))
            except RunError:
                broken = broken + 1 if log.passed == before else 1
                if broken > _PATIENCE:
                    raise
                time.sleep(_RETRY_S)
            else:
                broken = 0
                job = self.get(submission)
                if job is None:
                    raise RunError(f"job {submission} of {self.address} is gone: it was deleted, or the cluster ended")
                if not job.alive:
                    log.start_again()
                    log.add(self.log(submission))
                    return job
                time.sleep(_LOOK_S)

    async def _tail(self, submission: str, log: _PassedOn) -> None:
        """Reads the log once, from its first line on. What `log` raises is not the fault of the server."""
        log.start_again()
        lines: AsyncIterator[str] = self._client.tail_job_logs(submission)
        while True:
            with self._spoken():
                text = await anext(lines, None)
            if text is None:
                return
            log.add(text)

    def kill(self, submission: str) -> None:
        """Ends a job: SIGTERM, and SIGKILL after three seconds."""
        with self._spoken():
            self._client.stop_job(submission)

    def forget(self, submission: str) -> None:
        """Removes a job that has ended from the list of jobs."""
        with self._spoken():
            self._client.delete_job(submission)

    def ended(self, submission: str, seconds: float) -> Job | None:
        """Waits for the end of a job; None if it has not ended in time."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.get(submission)
            if job is None or not job.alive:
                return job
            if time.monotonic() > deadline:
                return None
            time.sleep(_LOOK_S)

    @contextmanager
    def _spoken(self) -> Iterator[None]:
        """Turns what the client raises into a sentence."""
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise UserError(refused_token(self.address)) from None
        except (UserError, RunError):
            raise
        except (RuntimeError, OSError, ClientError) as error:
            raise RunError(f"the Jobs API at {self.address} does not answer as it should: {_short(error)}") from None


def _checked_address(address: str) -> str:
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("http", "https") or not parts.hostname or port is None:
        raise UserError(
            f"address {address!r} must have the form http://HOST:PORT, the dashboard of the head, whose port is 8265 "
            "where none was set; HOST:6379 is for commands that join the cluster themselves"
        )
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at {address!r} ({error}); check --address and RAY_API_SERVER_ADDRESS, and that the head "
            "was started with --dashboard-host=0.0.0.0, or is reached through a forwarded port"
        ) from None
    return f"{parts.scheme}://{parts.netloc}"


def _job(details: Any) -> Job:
    metadata = dict(details.metadata or {})
    state = _STATES[str(getattr(details.status, "value", details.status))]
    if state == "failed" and details.driver_exit_code in _SIGNALLED:
        state = "stopped"
    return Job(
        str(details.submission_id),
        state,
        metadata,
        details.entrypoint,
        details.driver_exit_code,
        (details.message or "").strip(),
        None if details.start_time is None else details.start_time / 1000,
        None if details.end_time is None else details.end_time / 1000,
    )


def _short(error: Exception) -> str:
    """The last line of an error: the server sends its traceback."""
    lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
