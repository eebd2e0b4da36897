"""registry list, show, best, pull, renew."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from spikefleet.cli.app import RunsDir, console
from spikefleet.registry.api import RegisteredVersion

registry_app = typer.Typer(help="Look up registered models.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_SHOWN_TAGS = (
    "task",
    "dataset",
    "data_hash",
    "recipe",
    "connection",
    "decoder",
    "neuron",
    "timesteps",
    "bound",
    "parameters",
    "spike_driven",
    "seed",
    "run_name",
    "code_version",
)


@registry_app.command("list")
def list_registered(as_json: AsJson = False, runs_dir: RunsDir = Path("runs")) -> None:
    """All registered models with their champions."""
    from spikefleet import registry
    from spikefleet.tracking.mlflow_client import resolve_tracking_uri

    models = registry.list_models(tracking_uri=resolve_tracking_uri(runs_dir))
    if as_json:
        _print_json([{"name": m.name, "versions": [_plain(v) for v in m.versions]} for m in models])
        return
    table = Table("model", "versions", "champion", "metrics of the champion")
    for model in models:
        champion = model.champion
        table.add_row(
            model.name,
            str(len(model.versions)),
            str(champion.version) if champion else "-",
            _metrics(champion) if champion else "-",
        )
    console.print(table)


@registry_app.command("show")
def show_registered(name: str, as_json: AsJson = False, runs_dir: RunsDir = Path("runs")) -> None:
    """All versions of a registered model."""
    from spikefleet import registry
    from spikefleet.tracking.mlflow_client import resolve_tracking_uri

    model = registry.show(name, tracking_uri=resolve_tracking_uri(runs_dir))
    _print_versions(model.versions, as_json)


@registry_app.command("best")
def best_registered(
    task: Annotated[str, typer.Option(help="classification or detection.")],
    metric: Annotated[str, typer.Option(help="Metric on the validation split (top1), or with a split (test/top1).")],
    dataset: Annotated[str | None, typer.Option(help="Only networks trained on this data set.")] = None,
    where: Annotated[
        str | None,
        typer.Option(help='Conditions, for example "timesteps * bound <= 8 and (connection==bsg or decoder==rate)".'),
    ] = None,
    mode: Annotated[Literal["max", "min"], typer.Option(help="Which end of the metric is the best.")] = "max",
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """The best version of all registered models."""
    from spikefleet import registry
    from spikefleet.tracking.mlflow_client import resolve_tracking_uri

    uri = resolve_tracking_uri(runs_dir)
    version = registry.best(task, metric, dataset=dataset, where=where, mode=mode, tracking_uri=uri)
    _print_versions([version], as_json)


@registry_app.command("pull")
def pull_registered(
    uri: Annotated[str, typer.Argument(help="NAME@champion, NAME/3, or the same after models:/.")],
    out: Annotated[Path, typer.Option(help="Directory for the weights, the configuration and their hashes.")],
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Fetch a version as files; their hashes are checked."""
    from spikefleet import registry
    from spikefleet.tracking.mlflow_client import resolve_tracking_uri

    folder = registry.pull(_full(uri), out, tracking_uri=resolve_tracking_uri(runs_dir))
    for path in sorted(folder.iterdir()):
        console.print(str(path), highlight=False, soft_wrap=True)


@registry_app.command("renew")
def renew_registered(
    uri: Annotated[str, typer.Argument(help="NAME@champion, NAME/3, or the same after models:/.")],
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Register a version of an earlier spikefleet again, so that MLflow can serve it."""
    from spikefleet import registry
    from spikefleet.tracking.mlflow_client import resolve_tracking_uri

    version = registry.renew(_full(uri), tracking_uri=resolve_tracking_uri(runs_dir))
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    console.print(f"registered as {version.uri}{aliases}", highlight=False)


def _full(uri: str) -> str:
    return uri if uri.startswith("models:") else f"models:/{uri}"


def _print_versions(versions: Sequence[RegisteredVersion], as_json: bool) -> None:
    if as_json:
        _print_json([_plain(version) for version in versions])
        return
    for version in versions:
        title = f"{version.uri}  {', '.join(version.aliases)}".rstrip()
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_row("metrics", _metrics(version))
        for key in _SHOWN_TAGS:
            if key in version.tags:
                table.add_row(key, version.tags[key])
        table.add_row("run", version.run_id)
        table.add_row("registered", f"{version.created:%Y-%m-%d %H:%M} UTC")
        console.print(table)


def _metrics(version: RegisteredVersion) -> str:
    return "\n".join(f"{name} {value:.4f}" for name, value in sorted(version.metrics.items()))


def _plain(version: RegisteredVersion) -> dict[str, Any]:
    return {
        "uri": version.uri,
        "run_id": version.run_id,
        "created": version.created.isoformat(),
        "aliases": list(version.aliases),
        "metrics": dict(version.metrics),
        "tags": dict(version.tags),
    }


def _print_json(data: Any) -> None:
    json.dump(data, sys.stdout, indent=2)
    sys.stdout.write("\n")
