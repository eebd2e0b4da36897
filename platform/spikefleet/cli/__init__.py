"""The command line. Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

from spikefleet.cli import inspection, reproduction, tuning
from spikefleet.cli.app import app
from spikefleet.cli.data import data_app
from spikefleet.cli.registry import registry_app
from spikefleet.cli.system import tracking_app
from spikefleet.cli.training import config_app

app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(registry_app, name="registry")
app.add_typer(tracking_app, name="tracking")


__all__ = ["app", "inspection", "main", "reproduction", "tuning"]


def main() -> None:
    """Entry point of `spikefleet`."""
    app()
