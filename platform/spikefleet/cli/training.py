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


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="Ray Train workers; 0 trains in this process.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU for each worker.")] = False,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the run; the same name resumes where it stopped.", autocompletion=run_names),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Resume this run, which must exist.", autocompletion=run_names)
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
    rows = [
        (key, f"{finished.validation[key]:.2%}" if key in finished.validation else "-", f"{value:.2%}")
        for key, value in finished.test.items()
    ]
    print_table(console, ["metric", number("validation"), number("test")], rows, title=f"run {finished.run.name}")
    if finished.promotion is not None:
        promotion = finished.promotion
        say(f"{promotion.name} version {promotion.version} is {promotion.alias}: {promotion.reason}")
    say(f"report: {finished.run.path / 'report'}")
    print_whole(console, f"tracking: {finished.look_at}  (or: spikefleet ui)")


def _as_data(finished: FinishedRun) -> dict[str, Any]:
    promotion = finished.promotion
    return {
        "run": finished.run.name,
        "path": str(finished.run.path),
        "validation": dict(finished.validation),
        "test": dict(finished.test),
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
    import yaml

    from spikefleet.config.recipes import load_config, parse_overrides

    config: Config = load_config(recipe, parse_overrides(overrides or []))
    sys.stdout.write(yaml.safe_dump(config.dump(), sort_keys=False))
