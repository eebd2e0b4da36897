"""submit, status, logs, stop."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikefleet.cli.app import app
from spikefleet.cli.completion import run_names
from spikefleet.cli.output import console, loading, messages, print_json, say, stderr
from spikefleet.cli.parameters import AsJson, RunsDir
from spikefleet.cli.tables import Column, number, print_record, print_table, text
from spikefleet.errors import UserError
from spikefleet.status import one_line, print_line, print_whole, printable, waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from spikefleet.jobs.run_state import RunState
    from spikefleet.jobs.server import Job, JobServer

Head = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        help="Dashboard of the cluster's head, http://HOST:8265.",
    ),
]
AnyRun = Annotated[
    str, typer.Argument(help="Name of a run; with --address, or a submission id.", autocompletion=run_names)
]
_LOOK_S = 0.5
_ENDED = ("finished", "failed", "interrupted", "killed", "damaged")


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    command: Annotated[
        list[str],
        typer.Argument(
            help="train, tune, reproduce, retrain, data prepare or evaluate, with its own arguments and options."
        ),
    ],
    address: Head = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow its log to its end, and end with its exit code.")
    ] = True,
    with_code: Annotated[
        Path | None,
        typer.Option(help="Directory with code, such as plugins and recipes, that the job gets; at most 50 MB."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a command on a cluster as a Ray job: it is checked here, runs there, and its log is followed here.

    The same command again follows the job that runs. Options of this command that the other has too are written after
    `--`. Ctrl-C ends the following alone; `spikefleet stop` stops the job.
    """
    from spikefleet.cli.submissions import checked

    if address is None:
        raise UserError(
            "submit needs --address http://HOST:8265, or RAY_API_SERVER_ADDRESS; without a cluster, leave out `submit`"
        )
    where = messages(as_json)
    with loading("what checks the command", where) as announce:
        submission = checked(command, with_code)
        announce("connecting to the cluster")
        from spikefleet.jobs.server import JobServer
        from spikefleet.jobs.submitting import submit_or_follow

        server = JobServer(address)
        announce("submitting")
        job, new = submit_or_follow(server, submission, lambda line: print_line(where, line))
    verb = "submitted" if new else "runs already; it was submitted"
    by = "" if new else f" by {job.metadata.get('user', 'somebody')}"
    print_line(where, f"job {job.id} {verb}{by} to {server.address}")
    if wait:
        job = _followed(server, job, where.file.write)
    if as_json:
        print_json({**_job_data(job), "new": new, "address": server.address})
    if wait:
        _end_as(job)
    elif not as_json:
        print_whole(console, f"follow it: spikefleet logs {job.id} -f --address {server.address}")


def _followed(server: JobServer, job: Job, write: Callable[[str], object]) -> Job:
    """Follows the log of a job to its end."""

    def show(lines: str) -> None:
        write(printable(lines))
        sys.stdout.flush()

    try:
        return server.follow(job.id, show)
    except KeyboardInterrupt:
        print_line(stderr, f"interrupted: no longer following; job {job.id} keeps running")
        print_whole(stderr, f"stop it with a checkpoint: spikefleet stop {job.id} --address {server.address}")
        raise


def _end_as(job: Job) -> None:
    """Ends this command as a job has ended."""
    if job.state == "finished":
        return
    how = f"exit code {job.exit_code}" if job.exit_code is not None else one_line(job.message[:200])
    print_line(stderr, f"job {job.id} {job.state} ({how})")
    raise typer.Exit(job.exit_code if job.exit_code and 0 < job.exit_code < 256 else 1)


def _job_data(job: Job) -> dict[str, Any]:
    return {
        "job": job.id,
        "kind": job.kind,
        "run": job.run,
        "state": job.state,
        "exit_code": job.exit_code,
        "user": job.metadata.get("user"),
        "code_version": job.metadata.get("code_version"),
    }


@app.command()
def status(
    run: Annotated[
        str | None,
        typer.Argument(help="Name of a run; with --address, or a submission id.", autocompletion=run_names),
    ] = None,
    address: Head = None,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Show how far runs are, and what they wait for: those of --runs-dir, or the jobs of a cluster."""
    with loading("the states of runs", stderr):
        states = _states_there(address, run) if address is not None else _states_here(runs_dir, run)
    if as_json:
        data = [state.as_data() for state in states]
        print_json(data if run is None else data[0])
        return
    if run is not None:
        print_record(console, [(name, value) for name, value in _shown(states[0]).items() if value], run)
        return
    if not states:
        say(f"no run is in {runs_dir}" if address is None else f"spikefleet has submitted no job to {address}")
        return
    rows = [tuple(_shown(state).values()) for state in states]
    columns = [
        Column("run"),
        Column("kind"),
        Column("state", styles={"finished": "green", "failed": "red", "killed": "red", "waiting": "yellow"}),
        Column("epoch"),
        Column("left"),
        Column("metric"),
        number("restarts", optional=True),
        text("detail", optional=True),
        Column("since"),
        Column("job", optional=True),
    ]
    print_table(console, columns, rows)


def _states_here(runs_dir: Path, name: str | None) -> list[RunState]:
    from spikefleet.jobs.run_state import state_of_run
    from spikefleet.runs.run_dir import Run, find_run

    if name is not None:
        return [state_of_run(find_run(runs_dir, name))]
    return [state_of_run(Run(path.parent)) for path in sorted(runs_dir.glob("*/run.json"))]


def _states_there(address: str, name: str | None) -> list[RunState]:
    from spikefleet.jobs.run_state import state_of_job
    from spikefleet.jobs.server import JobServer

    server = JobServer(address)
    jobs = server.jobs() if name is None else [server.find(name)]
    read = [job.state == "running" or (name is not None and job.state != "pending") for job in jobs]
    return [state_of_job(job, server.log(job.id) if log else "") for job, log in zip(jobs, read, strict=True)]


def _shown(state: RunState) -> dict[str, str]:
    epoch = "" if state.epoch is None else f"{state.epoch}/{state.epochs}"
    left = "" if state.remaining_s is None else f"{state.remaining_s // 60:.0f} min {state.remaining_s % 60:.0f} s"
    metrics = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in list((state.metrics or {}).items())[:1]
    ]
    since = "" if state.since is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.since))
    return {
        "run": state.run,
        "kind": state.kind,
        "state": state.state,
        "epoch": epoch,
        "left": left,
        "metric": " ".join(metrics),
        "restarts": "" if not state.restarts else str(state.restarts),
        "detail": one_line(state.detail),
        "since": since,
        "job": state.job or "",
    }


@app.command()
def logs(
    run: AnyRun,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay, and show what comes, to its end.")] = False,
    address: Head = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Print the log of a run of --runs-dir, or of a job of a cluster."""
    if address is None:
        _print_log(runs_dir, run, follow)
        return
    with loading("the client of the cluster", stderr):
        from spikefleet.jobs.server import JobServer

        server = JobServer(address)
        job = server.find(run)
    if follow:
        _end_as(_followed(server, job, sys.stdout.write))
    else:
        sys.stdout.write(printable(server.log(job.id)))


def _print_log(runs_dir: Path, name: str, follow: bool) -> None:
    from spikefleet.jobs.run_state import state_of_run
    from spikefleet.runs.run_dir import find_run
    from spikefleet.runs.run_log import LOG

    run = find_run(runs_dir, name)
    path = run.path / LOG
    if not path.is_file() and not follow:
        raise UserError(f"run {name} has no log yet; it is written from its start on: {path}")
    position = 0
    while True:
        ended = state_of_run(run).state in _ENDED  # before the file is read, which may have got its last lines
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                sys.stdout.write(printable(file.read()))
                position = file.tell()
            sys.stdout.flush()
        if not follow or ended:
            return
        time.sleep(_LOOK_S)


@app.command()
def stop(
    run: AnyRun,
    now: Annotated[bool, typer.Option("--now", help="Kill it after a few seconds, without a checkpoint.")] = False,
    grace: Annotated[
        float,
        typer.Option(min=0, help="With --address: seconds for the step and its checkpoint, then it is killed."),
    ] = 60.0,
    address: Head = None,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Stop a run of this machine, or a job of a cluster, after its step, with a checkpoint from which it resumes."""
    if address is None:
        with waiting(stderr, f"stopping {run}") as announce:
            from spikefleet.jobs.run_state import state_of_run
            from spikefleet.jobs.stopping import stop_run
            from spikefleet.runs.run_dir import find_run

            found = find_run(runs_dir, run)
            sentence = stop_run(found, now=now, announce=announce)
        if as_json:
            print_json({**state_of_run(found).as_data(), "said": sentence})
        else:
            say(sentence)
        return
    with loading("the client of the cluster", stderr) as announce:
        from spikefleet.jobs.server import JobServer
        from spikefleet.jobs.stopping import stop_job

        server = JobServer(address)
        job = server.find(run)
        was_alive = job.alive
        ended = stop_job(server, job, now=now, grace_s=grace, announce=announce)
    if as_json:
        print_json({**_job_data(ended), "was_alive": was_alive})
        return
    how = "" if ended.exit_code is None else f" (exit code {ended.exit_code})"
    say(f"job {ended.id} has {'ended: ' if was_alive else 'already ended: '}{ended.state}{how}")
