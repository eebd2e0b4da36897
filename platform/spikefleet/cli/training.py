"""train, recipes, config show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikefleet.cli.app import app
from spikefleet.cli.completion import run_names
from spikefleet.cli.output import console, loading, messages, print_json, say, stderr
from spikefleet.cli.parameters import Address, AsJson, Overrides, Recipe, RunsDir, StoresDir, Verbose
from spikefleet.cli.tables import number, print_table, text
from spikefleet.status import print_line, print_whole

if TYPE_CHECKING:
    from spikefleet.config.schema import Config
    from spikefleet.runs.train_run import FinishedRun

config_app = typer.Typer(help="Look at configurations.", no_args_is_help=True)


def _checked_workers(given: str | None) -> str | None:
    """Refuses what is no number of workers, as an option with a number refuses a word."""
    from spikefleet.config.worker_count import parse_worker_count

    if given is not None:
        try:
            parse_worker_count(given)
        except ValueError as error:
            raise typer.BadParameter(f"{given!r} {error}") from None
    return given


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    workers: Annotated[
        str | None,
        typer.Option(
            callback=_checked_workers,
            metavar="N|MIN:MAX",
            help="Ray Train workers; 0 trains in this process; MIN:MAX follows the hosts that are there.",
        ),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU for each worker.")] = False,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the run; the same name resumes where it stopped.", autocompletion=run_names),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Resume this run, which must exist.", autocompletion=run_names)
    ] = None,
    extend_epochs: Annotated[
        int | None,
        typer.Option(
            help="With --resume: train so many more epochs, its schedule from the start (optim.lr=... sets it)."
        ),
    ] = None,
    address: Address = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Train a recipe, test and register its best checkpoint. The same command resumes an interrupted run."""
    from spikefleet.config.recipes import load_config, parse_overrides, with_cluster

    wanted = parse_overrides(overrides or [])
    if resume is None:
        load_config(recipe, with_cluster(wanted, workers, gpu))  # what is wrong is said before torch is loaded
    where = messages(as_json)
    with loading("torch", where):
        from spikefleet import api

    try:
        run = api.train(
            recipe,
            wanted,
            workers=workers,
            gpu=gpu,
            name=name,
            resume=resume,
            extend_epochs=extend_epochs,
            address=address,
            runs_dir=runs_dir,
            stores_dir=stores_dir,
            verbose=verbose,
            console=where,
        )
    except KeyboardInterrupt:
        print_line(stderr, "interrupted; the same command resumes from the last checkpoint")
        raise
    finished = run.finished
    if as_json:
        print_json(_as_data(finished))
        return
    _print_metrics(finished)
    if finished.promotion is not None:
        promotion = finished.promotion
        say(f"{promotion.name} version {promotion.version} is {promotion.alias or 'without alias'}: {promotion.reason}")
    say(f"report: {finished.run.path / 'report'}")
    print_whole(console, f"tracking: {finished.look_at}  (or: spikefleet ui)")


def _print_metrics(finished: FinishedRun) -> None:
    """The best checkpoint on the splits that there are, and the last one beside it."""
    last = {key.partition("/")[2]: value for key, value in finished.last.items()}
    split = next((key.partition("/")[0] for key in finished.last), "test")
    found = {"val": finished.validation, "test": finished.test}
    if finished.validation:
        found[f"last epoch, {split}"] = last
    shown = {name: metrics for name, metrics in found.items() if metrics}
    rows = [
        (key, *(f"{metrics[key]:.2%}" if key in metrics else "-" for metrics in shown.values()))
        for key in dict.fromkeys(key for metrics in shown.values() for key in metrics)
    ]
    print_table(console, ["metric", *map(number, shown)], rows, title=f"run {finished.run.name}")
    if not finished.validation:
        say("metrics of the last epoch: without a validation split no checkpoint is selected")


def _as_data(finished: FinishedRun) -> dict[str, Any]:
    promotion = finished.promotion
    return {
        "run": finished.run.name,
        "path": str(finished.run.path),
        "validation": dict(finished.validation),
        "test": dict(finished.test),
        "last": dict(finished.last),
        "registered": None
        if promotion is None
        else {
            "name": promotion.name,
            "version": promotion.version,
            "alias": promotion.alias,
            "reason": promotion.reason,
        },
        "report": str(finished.run.path / "report"),
        "tracking": finished.look_at,
    }


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with spikefleet."""
    from spikefleet.config.recipes import list_recipes, recipe_header

    headers = {name: recipe_header(name) for name in list_recipes()}
    if as_json:
        print_json([{"recipe": name, "header": header} for name, header in headers.items()])
        return
    rows = [(name, header.partition("\n")[0]) for name, header in headers.items()]
    print_table(console, ["recipe", text("what it is")], rows)


@config_app.command("show")
def show_config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a recipe with its overrides, resolved and checked."""
    from spikefleet.config.recipes import load_config, parse_overrides
    from spikefleet.config.strict_yaml import dump_yaml

    config: Config = load_config(recipe, parse_overrides(overrides or []))
    sys.stdout.write(dump_yaml(config.dump()))
