"""doctor, ui, tracking sync, tracking repair."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Annotated

import typer

from spikefleet.cli.app import app
from spikefleet.cli.completion import run_names
from spikefleet.cli.output import console, loading, print_json, say, stderr
from spikefleet.cli.parameters import AsJson, RunsDir
from spikefleet.cli.tables import Column, print_table, text
from spikefleet.errors import RunError, UserError
from spikefleet.status import waiting
from spikefleet_tune.interruption import interruption
from spikefleet_tune.messages import counted, one_of

tracking_app = typer.Typer(help="Look after tracking records.", no_args_is_help=True)

_MARKS = {"good": "ok", "poor": "note", "bad": "bad"}
_LOCALHOST = "127.0.0.1"
_LOOK_S = 0.2


@app.command()
def doctor(as_json: AsJson = False, runs_dir: RunsDir = Path("runs")) -> None:
    """Check this machine: versions, devices, memory, Ray, the tracking server."""
    from spikefleet.cli.doctor import examine

    with loading("torch and examining this machine", stderr):
        findings = examine(runs_dir)
    bad = [finding.subject for finding in findings if finding.verdict == "bad"]
    if as_json:
        found = [{"verdict": _MARKS[one.verdict], "subject": one.subject, "finding": one.text} for one in findings]
        print_json({"fit": not bad, "findings": found})
    else:
        verdict = Column("verdict", styles={"ok": "green", "note": "yellow", "bad": "red"})
        rows = [(_MARKS[finding.verdict], finding.subject, finding.text) for finding in findings]
        print_table(console, [verdict, "what", text("finding")], rows)
    if bad:
        raise RunError(f"not fit to train: {', '.join(bad)}")


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Serve MLflow's pages over the local tracking database, on this machine only."""
    from spikefleet.tracking.mlflow_client import public_uri, quiet_mlflow, resolve_tracking_uri
    from spikefleet.tracking.mlflow_pages import TRAINING_PAGES
    from spikefleet.tracking.relocation import ready_database

    quiet_mlflow()
    uri = resolve_tracking_uri(runs_dir)
    if uri.startswith("http"):
        say(f"the tracking server is at {public_uri(uri)}")
        return
    _refuse_taken(port)
    with waiting(stderr, "opening the tracking database"):
        ready_database(uri)
    settings = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", _LOCALHOST, "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(command, env={**os.environ, **settings})
    try:
        with waiting(stderr, "starting the server of MLflow"):
            while server.poll() is None and not _answers(port):
                time.sleep(_LOOK_S)
        if server.poll() is not None:
            raise RunError(
                f"the server of MLflow ended with exit code {server.returncode} before it answered at port {port}; its "
                "messages are above; if another program has taken the port, give another one by --port"
            )
        say(f"http://{_LOCALHOST}:{port}/#/experiments?{TRAINING_PAGES}  (Ctrl-C ends it)")
        say('MLflow opens its pages for GenAI unless "Model training" is chosen once, at the top left')
        if server.wait():
            raise RunError(f"the server of MLflow ended with exit code {server.returncode}; its messages are above")
    except KeyboardInterrupt as error:
        if interruption(error).signum != signal.SIGINT:
            raise
    finally:
        server.terminate()
        server.wait()


def _answers(port: int) -> bool:
    """Whether a server of MLflow answers; another program may have taken the port since."""
    try:
        with urllib.request.urlopen(f"http://{_LOCALHOST}:{port}/health", timeout=1) as answer:
            return bool(answer.read(16) == b"OK")
    except (OSError, http.client.HTTPException):
        return False


def _refuse_taken(port: int) -> None:
    """Raises UserError where another process listens: MLflow itself would say so after seconds, and at length."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOCALHOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {_LOCALHOST} cannot be used ({error.strerror}); give another one, for example "
                f"--port {port + 1 if port < 65535 else port - 1}"
            ) from None


@tracking_app.command("sync")
def sync_run(
    run: Annotated[str, typer.Argument(help="A run's name, or its directory.", autocompletion=run_names)],
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Deliver the records of a run that the tracking server did not get while it was away."""
    from spikefleet.tracking.tracker import sync

    folder = Path(run) if Path(run).is_dir() or len(Path(run).parts) != 1 else runs_dir / run
    if not folder.is_dir():
        known = sorted(path.parent.name for path in runs_dir.glob("*/run.json"))
        raise UserError(f"run {run!r} does not exist in {runs_dir}; {one_of(known)}")
    with waiting(stderr, f"delivering the records of {folder.name}"):
        delivered = sync(folder)
    say(f"{counted(delivered, 'record')} delivered")


@tracking_app.command("repair")
def repair(runs_dir: RunsDir = Path("runs")) -> None:
    """Complete the schema of a tracking database whose creation was cut short, or that is of an earlier MLflow.

    Every run is kept, and a copy of the database from before.
    """
    from spikefleet.tracking.database import check_database, repair_database
    from spikefleet.tracking.mlflow_client import local_database, quiet_mlflow

    quiet_mlflow()
    path = local_database(runs_dir)
    if not path.is_file():
        raise UserError(f"{path} does not exist; the first training creates it")
    with loading("MLflow", stderr) as announce:
        announce("repairing the tracking database")
        backup = repair_database(path)
    check_database(path)
    if backup is None:
        say(f"{path} is sound")
    else:
        say(f"{path} is complete now; as it was before: {backup}")
