"""registry history, rollback."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spikefleet.cli.completion import model_names
from spikefleet.cli.output import console, loading, messages, print_json, say
from spikefleet.cli.parameters import AsJson, RunsDir
from spikefleet.cli.registry import asking, registry_app
from spikefleet.cli.tables import Column, number, print_table, text
from spikefleet.errors import RunError

ModelName = Annotated[str, typer.Argument(help="Name of the registered model.", autocompletion=model_names)]


@registry_app.command("history")
def show_history(name: ModelName, as_json: AsJson = False, runs_dir: RunsDir = Path("runs")) -> None:
    """Every change of a model's aliases, with its reason; each entry has the hash of the one before.

    Exit code 1 if an entry was changed or is missing.
    """
    from spikefleet import registry

    with asking(runs_dir) as uri:
        history = registry.read_history(name, tracking_uri=uri)
    if as_json:
        changes = [{**asdict(change), "sha256": change.sha256} for change in history.changes]
        print_json({"name": name, "changes": changes, "damage": history.damage})
    elif history.changes:
        rows = [
            (
                str(change.number),
                change.at.replace("T", " ").removesuffix("+00:00"),
                f"{change.action}: {change.alias}",
                f"{_version(change.before)} -> {_version(change.after)}",
                change.why,
                change.by,
            )
            for change in history.changes
        ]
        columns = [number("no"), Column("UTC"), Column("change"), Column("version"), text("why"), text("by")]
        print_table(console, columns, rows, title=f"aliases of {name}")
    elif history.damage is None:
        say(f"no change of an alias of {name} is recorded; the next promotion begins the history")
    if history.damage is not None:
        raise RunError(f"the history of model {name} is damaged: {history.damage}")


@registry_app.command("rollback")
def roll_back(
    name: ModelName,
    why: Annotated[str, typer.Option(help="The reason; it is kept in the history and with both versions.")],
    to: Annotated[int | None, typer.Option(min=1, help="Version; that which the champion replaced.")] = None,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Make an earlier version champion again; the present one is not promoted any more.

    Files and spike check of the earlier version are verified first.
    """
    from spikefleet import registry
    from spikefleet.tracking.mlflow_client import resolve_tracking_uri

    uri = resolve_tracking_uri(runs_dir)
    with loading("MLflow and verifying the version", messages(as_json)) as announce:
        outcome = registry.rollback(name, why, to, tracking_uri=uri, announce=announce)
    if as_json:
        print_json({"name": outcome.name, "champion": outcome.champion, "reason": outcome.reason})
        return
    say(f"{outcome.name} version {outcome.version} is champion: {outcome.reason}")


def _version(number: int | None) -> str:
    return "-" if number is None else str(number)
