"""The command line. Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted by SIGINT, 143 by SIGTERM.

Commands import what takes seconds (torch, Ray, MLflow) when they run: help, listings and completion answer at once.
"""

from __future__ import annotations

import io
import os
import sys
from functools import partial

from spikefleet.cli import (
    cluster_job,
    completion,
    conversion,
    data_audit,
    export,
    gradients,
    inference,
    inspection,
    jobs,
    network_page,
    prediction,
    probing,
    registry_audit,
    registry_changes,
    reproduction,
    retraining,
    training,
    tuning,
)
from spikefleet.cli.app import app
from spikefleet.cli.data import data_app
from spikefleet.cli.registry import registry_app
from spikefleet.cli.system import tracking_app
from spikefleet.cli.training import config_app

app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(registry_app, name="registry")
app.add_typer(tracking_app, name="tracking")


__all__ = [
    "app",
    "cluster_job",
    "conversion",
    "data_audit",
    "export",
    "gradients",
    "inference",
    "inspection",
    "jobs",
    "main",
    "network_page",
    "prediction",
    "probing",
    "registry_audit",
    "registry_changes",
    "reproduction",
    "retraining",
    "training",
    "tuning",
]


def main() -> None:
    """Entry point of `spikefleet`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may have characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    command = partial(app, prog_name="spikefleet")  # the name of the variable by which a shell asks follows from it
    if os.environ.get(completion.VARIABLE) == "complete_bash":
        completion.answer_bash(command)
    else:
        command()
