"""doctor, ui, tracking sync."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from spikefleet.cli.app import RunsDir, app, console
from spikefleet.errors import RunError

tracking_app = typer.Typer(help="Look after tracking records.", no_args_is_help=True)


@app.command()
def doctor(runs_dir: RunsDir = Path("runs")) -> None:
    """Check this machine: versions, devices, memory, Ray, the tracking server."""
    from spikefleet.cli.doctor import examine

    findings = examine(runs_dir)
    table = Table("", "what", "finding")
    marks = {"good": "[green]ok[/]", "poor": "[yellow]note[/]", "bad": "[red]bad[/]"}
    for finding in findings:
        table.add_row(marks[finding.verdict], finding.subject, finding.text)
    console.print(table)
    bad = [finding.subject for finding in findings if finding.verdict == "bad"]
    if bad:
        raise RunError(f"not fit to train: {', '.join(bad)}")


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Serve MLflow's pages over the local tracking database, on this machine only."""
    from spikefleet.tracking.mlflow_client import public_uri, quiet_mlflow, resolve_tracking_uri

    quiet_mlflow()
    uri = resolve_tracking_uri(runs_dir)
    if uri.startswith("http"):
        console.print(f"the tracking server is at {public_uri(uri)}", highlight=False)
        return
    console.print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)", highlight=False)
    settings = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    try:
        done = subprocess.run(command, env={**os.environ, **settings}, check=False)
    except KeyboardInterrupt:
        return
    if done.returncode:
        raise RunError(f"mlflow ui ended with exit code {done.returncode}; is port {port} free?")


@tracking_app.command("sync")
def sync_run(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a run, for example runs/digits.")],
) -> None:
    """Deliver the records of a run that the tracking server did not get while it was away."""
    from spikefleet.tracking.tracker import sync

    console.print(f"{sync(run_dir)} records delivered", highlight=False)
