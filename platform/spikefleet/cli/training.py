"""train, evaluate, predict, recipes, config show."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml
from rich.table import Table

from spikefleet.cli.app import (
    Address,
    Network,
    RunsDir,
    StoresDir,
    Verbose,
    app,
    console,
    stderr,
)
from spikefleet.config.recipes import list_recipes, load_config, override_config, parse_overrides, recipe_header
from spikefleet.config.schema import Config
from spikefleet.errors import UserError

config_app = typer.Typer(help="Look at configurations.", no_args_is_help=True)

Recipe = Annotated[str, typer.Argument(help="Name of a recipe (`spikefleet recipes`) or path of a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, for example model.timesteps=2 optim.lr=0.05.")
]
_SHOWN_CLASSES = 100


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="Ray Train workers; 0 trains in this process.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU for each worker.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run; the same name goes on where it stopped.")] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this run, which must exist.")] = None,
    address: Address = None,
    verbose: Verbose = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Train a recipe, test and register its best checkpoint. The same command goes on with an interrupted run."""
    from spikefleet.runs.options import Options
    from spikefleet.runs.run_dir import find_run
    from spikefleet.runs.train_run import run_training

    wanted = parse_overrides(overrides or [])
    if workers is not None:
        wanted["cluster.workers"] = workers
    if gpu:
        wanted["cluster.gpu"] = True
    if resume is None:
        config = load_config(recipe, wanted)
    elif name not in (None, resume):
        raise UserError(f"--name {name} and --resume {resume} name two runs; give one of them")
    else:
        held = find_run(runs_dir, resume).config()
        if held.recipe != Path(recipe).stem:
            raise UserError(f"run {resume} was trained by recipe {held.recipe!r}, not {recipe!r}")
        config = override_config(held, wanted, origin=f"run {resume}")
    options = Options(runs_dir, stores_dir, address, verbose)
    try:
        finished = run_training(config, options, console, name or resume)
    except KeyboardInterrupt:
        stderr.print("interrupted; the same command goes on from the last checkpoint", highlight=False)
        raise
    figures = Table(finished.run.name, "validation", "test")
    for key, value in finished.test.items():
        figures.add_row(key, f"{finished.validation.get(key, float('nan')):.2%}", f"{value:.2%}")
    console.print(figures)
    if finished.promotion is not None:
        promotion = finished.promotion
        console.print(f"{promotion.name} version {promotion.version} is {promotion.alias}: {promotion.reason}")
    console.print(f"pictures: {finished.run.path / 'report'}", highlight=False, soft_wrap=True)
    console.print(f"tracking: {finished.look_at}  (or: spikefleet ui)", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    network: Network,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Part of the data.")] = "test",
    data: Annotated[str | None, typer.Option(help="Another store than the one that the configuration names.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report and its pictures.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Evaluate on a GPU.")] = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Measure a trained network on a split of its data."""
    from spikefleet.inference.trained_network import evaluate_on_split, open_trained_network

    trained = open_trained_network(network, runs_dir)
    evaluation = evaluate_on_split(trained, split, stores_dir, console, data=data, gpu=gpu)
    details = trained.task.details(evaluation.predictions, evaluation.targets)
    console.print(f"{network} on {details['samples']} {split} samples", highlight=False, soft_wrap=True)
    report = trained.task.report
    header, *rows = report.table(details)
    table = Table(*header)
    for row in rows[:_SHOWN_CLASSES]:
        table.add_row(*row)
    if len(rows) > _SHOWN_CLASSES:
        table.add_row("...", *("" for _ in header[1:]))
    console.print(table)
    for key, value in details["metrics"].items():
        console.print(f"{key} {value:.2%}", highlight=False)
    if evaluation.health:
        console.print(f"firing rate {evaluation.health['firing_rate']:.3f}", highlight=False)
    if out is not None:
        report.write(details, evaluation.predictions, evaluation.targets, out)
        console.print(f"report: {out}", highlight=False)


@app.command()
def predict(
    network: Network,
    images: Annotated[list[Path], typer.Argument(help="Picture files or folders of them.")],
    out: Annotated[
        Path | None, typer.Option(help="A .png with all pictures; for detection, a folder for pictures with boxes.")
    ] = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Detection: least score of a box.")] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="Print predictions as JSON.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Predict on a GPU.")] = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Classify pictures, or find objects in them."""
    from spikefleet.inference.prediction import predict_files
    from spikefleet.inference.trained_network import open_trained_network

    trained = open_trained_network(network, runs_dir)
    answers = predict_files(trained, images, out=out, gpu=gpu, score=score)
    if as_json:
        json.dump(answers, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    report = trained.task.report
    header, *rows = report.answer_table(answers)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if out is not None:
        console.print(f"{'pictures' if report.draws_each else 'picture'}: {out}", highlight=False)


@app.command()
def recipes() -> None:
    """List the recipes that come with spikefleet."""
    table = Table("recipe", "what it is")
    for name in list_recipes():
        table.add_row(name, recipe_header(name).partition("\n")[0])
    console.print(table)


@config_app.command("show")
def show_config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a recipe with its overrides, resolved and checked."""
    config: Config = load_config(recipe, parse_overrides(overrides or []))
    sys.stdout.write(yaml.safe_dump(config.dump(), sort_keys=False))
