"""registry list, show, best, pull, renew, reindex."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spikefleet.cli.completion import model_names, version_names
from spikefleet.cli.output import console, loading, print_json, say, stderr
from spikefleet.cli.parameters import AsJson, RunsDir
from spikefleet.cli.tables import Column, number, print_record, print_table, text
from spikefleet.outputs import check_place
from spikefleet.status import one_line, print_line

if TYPE_CHECKING:
    from spikefleet.registry import RegisteredVersion

registry_app = typer.Typer(help="Look up registered models.", no_args_is_help=True)

Reference = Annotated[
    str,
    typer.Argument(help="NAME@champion, NAME/3, or the same after models:/.", autocompletion=version_names),
]

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
    "proof_deployed",
    "proof_binary",
    "proof_metric",
    "proof_alone",
    "flaw",
    "seed",
    "run_name",
    "code_version",
)


@registry_app.command("list")
def list_registered(as_json: AsJson = False, runs_dir: RunsDir = Path("runs")) -> None:
    """All registered models with their champions."""
    from spikefleet import registry

    with asking(runs_dir) as uri:
        models = registry.list_models(tracking_uri=uri)
    if as_json:
        print_json([{"name": m.name, "versions": [_plain(v) for v in m.versions]} for m in models])
        return
    rows = [
        (
            model.name,
            str(len(model.versions)),
            str(champion.version) if (champion := model.champion) else "-",
            _metrics(champion) if champion else "-",
        )
        for model in models
    ]
    columns: list[Column | str] = ["model", number("versions"), number("champion"), text("metrics of the champion")]
    print_table(console, columns, rows)


@registry_app.command("show")
def show_registered(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of a registered model; with --card also NAME@ALIAS or NAME/3.", autocompletion=model_names
        ),
    ],
    card: Annotated[
        bool, typer.Option("--card", help="The model card of one version, as Markdown; by default the champion's.")
    ] = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """All versions of a registered model, or the model card of one."""
    from spikefleet import registry

    with asking(runs_dir) as uri:
        if card:
            reference = _full(name if "@" in name or "/" in name else f"{name}@champion")
            text = registry.card_text(reference, tracking_uri=uri)
        else:
            model = registry.show(name, tracking_uri=uri)
    if card:
        print_json({"uri": reference, "card": text}) if as_json else say(text.rstrip())
        return
    _print_versions(model.versions, as_json)


@registry_app.command("best")
def best_registered(
    task: Annotated[str, typer.Option(help="classification or detection.")],
    metric: Annotated[str, typer.Option(help="Metric on the validation split (top1), or with a split (test/top1).")],
    dataset: Annotated[str | None, typer.Option(help="Only networks trained on this data set.")] = None,
    where: Annotated[
        str | None,
        typer.Option(
            help='Conditions, for example "timesteps<=2 and energy_mj<40 and latency_ms<50" or "timesteps * bound <= 8 '
            'and (connection==bsg or decoder==rate)".'
        ),
    ] = None,
    mode: Annotated[Literal["max", "min"], typer.Option(help="Which end of the metric is the best.")] = "max",
    top: Annotated[int, typer.Option(help="So many versions, the best first, as a table.", min=1)] = 1,
    any_proof: Annotated[
        bool,
        typer.Option(
            "--any-proof",
            help="Also spiking networks of which the spike check has not proved that they are spike-driven.",
        ),
    ] = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """The best versions of all registered models."""
    from spikefleet import registry
    from spikefleet.registry.version import latency_remark

    with asking(runs_dir) as uri:
        versions = registry.ranked(
            task,
            metric,
            dataset=dataset,
            where=where,
            mode=mode,
            top=top,
            any_proof=any_proof,
            tracking_uri=uri,
            announce=lambda line: print_line(stderr, line),
        )
    if (remark := latency_remark(versions)) is not None:
        print_line(stderr, one_line(remark))
    if as_json or top == 1:
        _print_versions(versions, as_json)
        return
    name = metric.removeprefix("val/").removeprefix("test/")
    columns: list[Column | str] = [
        "version",
        text("aliases"),
        number(f"val/{name}"),
        number(f"test/{name}"),
        number("T"),
        number("D"),
    ]
    columns += [number("energy_mj"), number("latency_ms"), number("parameters"), "data_hash", "registered"]
    print_table(console, columns, [_row(version, metric, name) for version in versions])


@registry_app.command("reindex")
def reindex_registered(runs_dir: RunsDir = Path("runs")) -> None:
    """Index the versions of an earlier spikefleet, and edited ones, so that `registry best` finds them fast."""
    from spikefleet import registry

    with asking(runs_dir) as uri:
        done = registry.reindex(
            tracking_uri=uri,
            progress=lambda at, of: print_line(stderr, f"{at} of {of} versions") if at % 100 == 0 and at < of else None,
        )
    for version, reason in done.failed:
        say(f"{version} cannot be indexed: {reason}")
    before = done.versions - done.indexed - len(done.failed)
    say(f"{done.indexed} of {done.versions} versions indexed; {before} were indexed before")


@registry_app.command("pull")
def pull_registered(
    uri: Reference,
    out: Annotated[Path, typer.Option(help="Directory for the weights, the configuration and their hashes.")],
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Fetch a version as files; their hashes are checked."""
    from spikefleet import registry

    check_place(out, "--out")
    with asking(runs_dir) as tracking_uri:
        folder = registry.pull(_full(uri), out, tracking_uri=tracking_uri)
    for path in sorted(folder.iterdir()):
        say(str(path))


@registry_app.command("renew")
def renew_registered(uri: Reference, runs_dir: RunsDir = Path("runs")) -> None:
    """Register a version of an earlier spikefleet again, so that MLflow can serve it.

    It gets the aliases of the old one, unless a flaw or a missing spike check forbids it.
    """
    from spikefleet import registry
    from spikefleet.registry.version import CHAMPION

    with asking(runs_dir) as tracking_uri:
        before = registry.describe(_full(uri), tracking_uri=tracking_uri)["uri"]
        version = registry.renew(_full(uri), tracking_uri=tracking_uri)
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    if version.uri == before:
        say(f"{version.uri}{aliases} is current: it has the serving code of this spikefleet, and nothing is to be done")
        return
    say(f"registered as {version.uri}{aliases}")
    if (refusal := registry.refused_alias(version, CHAMPION)) is not None:
        say(refusal)


@contextmanager
def asking(runs_dir: Path) -> Iterator[str]:
    """The registry's URI, for a question that imports MLflow, which takes most of its time."""
    from spikefleet.tracking.mlflow_client import resolve_tracking_uri

    uri = resolve_tracking_uri(runs_dir)
    with loading("MLflow and asking the registry", stderr):
        yield uri
        if "torch" not in sys.modules:  # whose libraries complain at exit of what was not collected
            gc.freeze()  # else the exit looks through all that MLflow has made, which takes as long as the answer


def _full(uri: str) -> str:
    return uri if uri.startswith("models:") else f"models:/{uri}"


def _print_versions(versions: Sequence[RegisteredVersion], as_json: bool) -> None:
    if as_json:
        print_json([_plain(version) for version in versions])
        return
    for version in versions:
        title = f"{version.uri}  {', '.join(version.aliases)}".rstrip()
        items = [("metrics", _metrics(version))]
        items += [(key, version.tags[key]) for key in _SHOWN_TAGS if key in version.tags]
        items += [("run", version.run_id), ("registered", f"{version.created:%Y-%m-%d %H:%M} UTC")]
        print_record(console, items, title=title)


def _row(version: RegisteredVersion, metric: str, name: str) -> list[str]:
    """A version in the table of the best; a metric that belongs to no split stands in the first column of both."""
    measured = version.metrics
    shown = [_measured(key, measured[key]) if key in measured else "-" for key in (f"val/{name}", f"test/{name}")]
    if shown == ["-", "-"] and (value := version.metric(metric)) is not None:
        shown[0] = _measured(metric, value)
    tags = version.tags
    costs = (f"{measured[key]:.4g}" if key in measured else "-" for key in ("energy_mj", "latency_ms"))
    return [
        version.uri.removeprefix("models:/"),
        ", ".join(version.aliases) or "-",
        *shown,
        tags.get("timesteps", "-"),
        tags.get("bound", "-"),
        *costs,
        tags.get("parameters", "-"),
        tags.get("data_hash", "-")[:12],
        f"{version.created:%Y-%m-%d %H:%M}",
    ]


def _metrics(version: RegisteredVersion) -> str:
    return "\n".join(f"{name} {_measured(name, value)}" for name, value in sorted(version.metrics.items()))


def _measured(name: str, value: float) -> str:
    """A metric with its unit: energies are in mJ, latencies in ms, a task's metrics are shares of 1."""
    if name.endswith("energy_mj"):
        return f"{value:.4g} mJ"
    if name == "latency_ms":
        return f"{value:.4g} ms"
    return f"{value:.2%}" if name.startswith(("val/", "test/")) and 0 <= value <= 1 else f"{value:.4g}"


def _plain(version: RegisteredVersion) -> dict[str, Any]:
    return {
        "uri": version.uri,
        "run_id": version.run_id,
        "created": version.created.isoformat(),
        "aliases": list(version.aliases),
        "metrics": dict(version.metrics),
        "tags": dict(version.tags),
    }
