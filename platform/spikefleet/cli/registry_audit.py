"""registry compare, verify, gc, notify."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikefleet.cli.completion import version_names
from spikefleet.cli.output import console, loading, print_json, say, stderr
from spikefleet.cli.parameters import AsJson, RunsDir, StoresDir
from spikefleet.cli.registry import asking, registry_app
from spikefleet.cli.tables import Column, number, print_table, text
from spikefleet.errors import RunError, UserError
from spikefleet.status import counting, one_line, print_line, waiting
from spikefleet_tune.messages import counted

if TYPE_CHECKING:
    from spikefleet.audit.comparison import Comparison
    from spikefleet.registry.leftovers import Leftover
    from spikefleet.registry.webhooks import Notification

_SHOWN_CLASSES = 10

Reference = Annotated[
    str,
    typer.Argument(
        help="NAME@champion, NAME/3, the same after models:/, or a pulled directory.", autocompletion=version_names
    ),
]


@registry_app.command("compare")
def compare_registered(
    first: Reference,
    second: Reference,
    resamples: Annotated[
        int, typer.Option(min=100, help="Of the images, for detectors; COCO's 5,000 take about 0.3 s each.")
    ] = 1000,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Two versions side by side: metrics, classes, configuration, energy, and a test on the images that both saw."""
    with loading("torch and MLflow", stderr):
        from spikefleet.audit.comparison import compare
        from spikefleet.tracking.mlflow_client import resolve_tracking_uri
    with counting(stderr, "comparing") as progress:
        found = compare(
            _reference(first),
            _reference(second),
            resamples=resamples,
            tracking_uri=resolve_tracking_uri(runs_dir),
            progress=progress,
        )
    if as_json:
        print_json(found.to_dict())
        return
    _print_comparison(found)


@registry_app.command("verify")
def verify_registered(
    uri: Reference,
    prove: Annotated[
        bool,
        typer.Option(
            "--prove", help="Make the spike check again: on the version's data, or without them on generated images."
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="With --prove, where the version's data are: a path, a URI or a name in --stores-dir."),
    ] = None,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Compare a version with what was registered: every file, the metrics and the tags. Exit code 1 if it changed."""
    if data is not None and not prove:
        raise UserError(f"--data {data} is used by --prove alone; add --prove")
    with loading("torch and MLflow", stderr):
        from spikefleet.registry.verification import verify
        from spikefleet.tracking.mlflow_client import resolve_tracking_uri

    tracking_uri = resolve_tracking_uri(runs_dir)
    with waiting(stderr, "verifying"):
        found = verify(_reference(uri), tracking_uri=tracking_uri)
    proof = None
    if prove and found.intact:
        from spikefleet.audit.proof_again import prove_again

        # By the number: an alias may have moved since the files were looked at.
        where = found.reference if found.reference.startswith("models:") else _reference(uri)
        proof = prove_again(where, stores_dir, stderr, data=data, tracking_uri=tracking_uri)
    if as_json:
        print_json({**found.to_dict(), "proof": None if proof is None else proof.to_dict()})
    else:
        for finding in found.findings:
            say(one_line(f"{'ok' if finding.intact else 'CHANGED'}  {finding.says}"))
        for note in found.notes:
            say(f"note: {one_line(note)}")
    if not found.intact:
        raise RunError(f"{found.reference} is not what was registered: {'; '.join(map(one_line, found.problems))}")
    if proof is not None and not as_json:
        for leg in proof.check.legs:
            say(leg.says)
    if proof is not None and not proof.confirmed:
        raise RunError(f"{found.reference}: {proof.says}")
    if not as_json:
        say(f"{found.reference}: {counted(len(found.findings), 'check')}, nothing has changed")
        if proof is not None:
            say(proof.says)


@registry_app.command("gc")
def remove_leftovers(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be removed, and remove nothing.")] = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Remove uploaded networks that no version names, as killed registrations and deleted versions leave behind.

    Only those that are complete and older than a day, and whose run is not running.
    """
    from spikefleet.registry import leftovers

    with asking(runs_dir) as uri:
        found = leftovers.find_leftovers(tracking_uri=uri)
    gone: list[Leftover] = []
    for one in found.found if dry_run else leftovers.remove_leftovers(found.found, tracking_uri=uri):
        gone.append(one)
        if not as_json:
            say(f"{'would remove' if dry_run else 'removed'} {one_line(_leftover(one))}")
    for sentence in found.kept:
        print_line(stderr, one_line(sentence))
    size = sum(one.size for one in gone)
    if as_json:
        plain = [{**vars(one), "created": one.created.isoformat()} for one in gone]
        print_json({"removed": not dry_run, "models": plain, "bytes": size, "kept": list(found.kept)})
        return
    what = "would be removed" if dry_run else "removed"
    say(f"{counted(len(gone), 'network')} without a version {what}: {_megabytes(size)}")


@registry_app.command("notify")
def notify_of_changes(
    url: Annotated[str | None, typer.Argument(help="Address that MLflow's server posts to, https://HOST/PATH.")] = None,
    secret_env: Annotated[
        str, typer.Option(help="Environment variable with the secret that signs the messages.")
    ] = "SPIKEFLEET_WEBHOOK_SECRET",
    test: Annotated[bool, typer.Option("--test", help="Have the server send an example message at once.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Stop telling this address (or webhook id).")] = False,
    show: Annotated[bool, typer.Option("--list", help="List the addresses that are notified.")] = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Have the MLflow server tell an address of new versions and of aliases that move (webhooks)."""
    if show == (url is not None) or (show and (remove or test)) or (remove and test):
        raise UserError("name one URL, perhaps with --test or --remove, or --list alone")
    secret = os.environ.get(secret_env, "")
    if url is not None and not remove and not secret:
        raise UserError(
            f"the environment variable {secret_env} is not set; put the secret that signs the messages into it, or "
            "name another one by --secret-env"
        )
    from spikefleet.registry import webhooks

    failure = None
    with asking(runs_dir) as uri:
        if url is None:
            found = webhooks.list_notifications(tracking_uri=uri)
        elif remove:
            found = webhooks.stop_notifying(url, tracking_uri=uri)
        else:
            found = [webhooks.notify(url, secret, tracking_uri=uri)]
            failure = webhooks.send_test(found[0].webhook_id, tracking_uri=uri) if test else None
    if as_json:
        print_json([one.to_dict() for one in found])
    else:
        _print_notifications(found, "removed" if remove else "")
    if failure is not None:
        raise RunError(f"the example message did not arrive: {failure}")
    if test and not as_json:
        say("the example message arrived")


def _print_notifications(found: Iterable[Notification], what: str) -> None:
    rows = [
        (one_line(one.url), ", ".join(one.events), what or one.status.lower(), f"{one.created:%F}", one.webhook_id)
        for one in found
    ]
    if not rows:
        say("no address is notified")
        return
    columns: list[Column | str] = ["address", text("events"), "status", "since", "id"]
    print_table(console, columns, rows)


def _print_comparison(found: Comparison) -> None:
    first, second = found.first.reference, found.second.reference
    say(f"first   {one_line(first)}")
    say(f"second  {one_line(second)}")
    rows = [(name, *_cells(name, *pair)) for name, pair in found.metrics.items()]
    heads: list[Column | str] = ["metric", number("first"), number("second"), number("second - first")]
    print_table(console, heads, rows)
    if classes := found.classes:
        metric = found.first.class_metric
        shown = list(classes.items())[:_SHOWN_CLASSES]
        rows = [(one_line(name), *_cells(f"test/{metric}", *pair)) for name, pair in shown]
        print_table(console, [f"{metric} of class", *heads[1:]], rows)
        if len(classes) > len(shown):
            say(f"{len(classes) - len(shown)} more classes differ less (--json shows them)")
    if config := found.config:
        fields = [(path, one_line(str(before)), one_line(str(after))) for path, (before, after) in config.items()]
        print_table(console, ["configuration", text("first"), text("second")], fields)
    else:
        say("the configurations do not differ in what affects the result")
    if found.paired is not None and found.paired.gained is not None:
        say(f"right by the second alone: {found.paired.gained} images; by the first alone: {found.paired.lost}")
    for word, names in (("worse", found.paired.worse), ("better", found.paired.better)) if found.paired else ():
        if names:
            say(f"the second one is {word} by more than chance at {one_line(', '.join(names))}")
    say(found.conclusion)


def _cells(name: str, first: float | None, second: float | None) -> tuple[str, str, str]:
    difference = None if first is None or second is None else second - first
    return _measured(name, first), _measured(name, second), _measured(name, difference, "+")


def _measured(name: str, value: float | None, sign: str = "") -> str:
    """A metric: energies are in mJ, latencies in ms, counts are whole, a task's metrics are shares of 1."""
    if value is None:
        return "-"
    if name.startswith(("val/", "test/")) and -1 <= value <= 1:
        return f"{value:{sign}.2%}"
    if name.endswith("energy_mj"):
        return f"{value:{sign}.4g} mJ"
    if name == "latency_ms":
        return f"{value:{sign}.4g} ms"
    return f"{value:{sign},.0f}" if value == int(value) else f"{value:{sign}.4g}"


def _leftover(one: Leftover) -> str:
    files = f"{counted(one.files, 'file')}, {_megabytes(one.size)}"
    return f"{one.model_id} ({one.name}, {one.created:%Y-%m-%d %H:%M} UTC): {files}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _reference(given: str) -> str | Path:
    """A registered version by its URI, or the directory of a pulled one."""
    from spikefleet.registry.package import CARD

    if given.startswith("models:"):
        return given
    if (Path(given) / CARD).is_file():
        return Path(given)
    if Path(given).is_dir() and not ("@" in given or given.rpartition("/")[2].isdigit()):
        raise UserError(f"{given} is no pulled version: it has no {CARD}; name one, or NAME@champion or NAME/3")
    return f"models:/{given}"
