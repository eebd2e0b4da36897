"""The state of a run in one record: from its directory, or from a job and its log."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spikefleet.errors import UserError
from spikefleet.jobs.server import Job
from spikefleet.runs.run_dir import Run
from spikefleet.runs.run_log import LOG
from spikefleet_tune.lock import holder_of

_EPOCH = re.compile(r"epoch +(\d+)/(\d+)")
_STEP = re.compile(r"step (\d+)/(\d+)")
_LEFT = re.compile(r"(\d+) min (\d+) s left")
_METRIC = re.compile(r"(val/\S+) (-?(?:[\d.]+(?:e[+-]?\d+)?|nan|inf)%?)(?!\S)")
_WAITS = re.compile(r"^((?:hosts? .+ (?:is|are) gone; )?the (?:run|search) waits for .*)")
_GOES_ON = re.compile(r"epoch +\d+/\d+|steps?, from step|resuming from|^restarting: |^searching: |^trial \d+")
_FAILED = "a worker failed:"
_TAIL_BYTES = 4096
_ALIVE = ("running", "waiting", "created")


@dataclass(frozen=True)
class RunState:
    """What `spikefleet status` shows of a run."""

    run: str
    kind: str
    state: str
    """created, pending, running, waiting, finished, failed, interrupted, stopped; killed: its process is gone."""
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    remaining_s: float | None = None
    """Seconds to the last step, at the rate so far; None unless it trains."""
    metrics: Mapping[str, float | str] | None = None
    """Latest metrics of the validation split."""
    restarts: int | None = None
    detail: str = ""
    """What it waits for, why it failed, or what its log says last."""
    since: float | None = None
    """When this state began, or the latest step was seen: seconds since the epoch; None for a job that waits, whose
    log says for how long."""
    job: str | None = None
    """Submission id."""

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def state_of_run(run: Run) -> RunState:
    """The state of a run of this machine, or of storage that it shares."""
    try:
        record = run.record()
    except UserError as error:
        return RunState(run.name, "train", "damaged", detail=str(error))
    status, progress = str(record["status"]), record.get("progress") or {}
    waits = record.get("waiting") or {}
    state, detail, since = status, "", progress.get("at")
    if status in _ALIVE and holder_of(run.path / ".lock") is None:
        state, detail = "killed", "its process is gone; the same command resumes it"
    elif status == "running":
        detail = _last_line(run)
    elif status == "waiting":
        detail, since = str(waits.get("for", "")), waits.get("since", since)
    elif status == "failed":
        detail = str(record.get("reason") or "")
    elif status == "finished":
        detail = str((record.get("ended") or {}).get("why", ""))
    elif status == "interrupted":
        detail = f"by {record['signal']}; the same command resumes it" if record.get("signal") else ""
    return RunState(
        run.name,
        "train",
        state,
        progress.get("epoch"),
        progress.get("epochs"),
        progress.get("step"),
        progress.get("steps"),
        _remaining(progress) if state == "running" else None,
        progress.get("metrics") or None,
        record.get("restarts", 0),
        detail,
        since,
    )


def _last_line(run: Run) -> str:
    """The last line of the run's log."""
    try:
        with (run.path / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def _remaining(progress: Mapping[str, Any]) -> float | None:
    try:
        done, left = progress["step"] - progress["from_step"], progress["steps"] - progress["step"]
        rate = (progress["at"] - progress["since"]) / done
        return max(0.0, float(rate * left) - (time.time() - progress["at"])) if left else 0.0
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def state_of_job(job: Job, log: str = "") -> RunState:
    """The state of a job.

    Args:
        job: as the cluster knows it.
        log: what it has printed so far.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    waits = _waits_for(lines) if job.state == "running" else None
    epoch, step, left = _last(_EPOCH, lines), _last(_STEP, lines), _last(_LEFT, lines)
    metric = _last(_METRIC, lines)
    detail = waits or (lines[-1] if lines else job.message)
    remaining = None
    if left is not None and job.state == "running" and waits is None:
        remaining = 60.0 * int(left[0]) + int(left[1])
    return RunState(
        job.run,
        job.kind,
        "waiting" if waits else job.state,
        None if epoch is None else int(epoch[0]),
        None if epoch is None else int(epoch[1]),
        None if step is None else int(step[0]),
        None if step is None else int(step[1]),
        remaining,
        None if metric is None else {metric[0]: metric[1]},
        sum(line.startswith(_FAILED) for line in lines),
        detail,
        None if waits else job.ended or job.started,
        job.id,
    )


def _last(pattern: re.Pattern[str], lines: list[str]) -> tuple[str, str] | None:
    for line in reversed(lines):
        if found := pattern.findall(line):
            first, second = found[-1]
            return first, second
    return None


def _waits_for(lines: list[str]) -> str | None:
    """What a running job waits for: the last such line, unless it has trained since."""
    for line in reversed(lines):
        if found := _WAITS.search(line):
            return found[1]
        if _GOES_ON.search(line):
            return None
    return None
