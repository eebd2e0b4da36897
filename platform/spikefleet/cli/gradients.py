"""gradients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikefleet.cli.app import app
from spikefleet.cli.completion import override_keys, trained_or_not
from spikefleet.cli.output import console, loading, print_json, say, stderr
from spikefleet.cli.parameters import AsJson, Force, OtherData, RunsDir, StoresDir
from spikefleet.cli.tables import Column, number, print_table
from spikefleet.errors import UserError
from spikefleet.outputs import check_outputs
from spikefleet.status import waiting

if TYPE_CHECKING:
    from spikefleet.config.schema import Config
    from spikefleet.training.checkpoints import Snapshot
    from spikefleet.training.gradient_check import GradientCheck


@app.command()
def gradients(
    network: Annotated[
        str,
        typer.Argument(
            help="Recipe or YAML file, at initialisation; a run's name, at its latest checkpoint; or a checkpoint.",
            autocompletion=trained_or_not,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="For a recipe: dotted overrides, for example model.gate_gradient=exact.", autocompletion=override_keys
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Training images of the one backward pass.")] = 32,
    noise: Annotated[
        int | None,
        typer.Option(min=1, help="Noise images with this side instead of data, which then need not be there."),
    ] = None,
    data: OtherData = None,
    out: Annotated[Path | None, typer.Option(help="File for the plot, a PNG.")] = None,
    force: Force = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Gradient norm, firing rate and relative step of each layer, before a network is trained or at a checkpoint.

    One backward pass of the training's loss. Says whether gradients explode or vanish on their way to the first layer,
    and whether a step is larger than the weights that it changes.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    if noise is not None and data is not None:
        raise UserError(f"--noise {noise} needs no data: leave out --data {data}")
    check_outputs([] if out is None else [out], inputs=[Path(network)], force=force)
    config = _recipe(network, overrides or [])
    with loading("torch", stderr):
        from spikefleet.data_access import open_data, store_at
        from spikefleet.data_summary import DataSummary
        from spikefleet.training.gradient_check import check_gradients, noise_batch, training_batch
        from spikefleet_pipelines.errors import SourceError

    snapshot = None
    if config is None:
        with waiting(stderr, f"opening {network}"):
            config, snapshot = _checkpoint(network, runs_dir)
    if noise is not None:
        batch, summary = noise_batch(config, images, noise)
    else:
        where = config.data.model_copy(update={"store": store_at(data, stores_dir)}) if data else config.data
        try:
            store = open_data(where, stores_dir, stderr)
        except SourceError as error:
            raise UserError(f"{error}; or measure on noise, for example by --noise 32") from None
        epoch = 0 if snapshot is None else min(snapshot.state["epoch"], config.train.epochs - 1)
        batch, summary = training_batch(config, store, images, epoch), DataSummary.of(store.manifest)
    with waiting(stderr, "running forward and backward"):
        check = check_gradients(config, batch, summary, snapshot)
    if out is not None:
        _draw(check, network, out)
    if as_json:
        print_json(check.to_dict())
        return
    _print(check, network)
    if out is not None:
        say(f"plot: {out}")


def _recipe(name: str, overrides: list[str]) -> Config | None:
    """The configuration of a recipe; None for what must be a run or a checkpoint."""
    from spikefleet.config.recipes import list_recipes, load_config, parse_overrides

    if name in list_recipes() or name.endswith((".yaml", ".yml")):
        return load_config(name, parse_overrides(overrides))
    if overrides:
        raise UserError(
            f"{overrides[0]}: a checkpoint has the configuration that it was trained by; overrides are for a recipe"
        )
    return None


def _checkpoint(reference: str, runs_dir: Path) -> tuple[Config, Snapshot]:
    """Configuration and state of a run's latest checkpoint, or of the checkpoint in a directory."""
    from spikefleet.config.messages import did_you_mean
    from spikefleet.config.recipes import list_recipes
    from spikefleet.runs.run_dir import Run, find_run
    from spikefleet.training.checkpoints import load_checkpoint

    folder = Path(reference)
    if folder.is_dir() and folder.parent.name == "checkpoints":
        run, path = Run(folder.parent.parent), folder
    elif Run(runs_dir / reference).exists or Run(folder).exists:
        run = find_run(runs_dir, reference)
        latest = run.checkpoints.latest()
        if latest is None:
            raise UserError(f"run {run.name} has no checkpoint yet; give its recipe to see the initial weights")
        path = latest
    else:
        known = [*list_recipes(), *(found.parent.name for found in runs_dir.glob("*/run.json"))]
        hint = did_you_mean(reference, known, "`spikefleet recipes` lists the recipes", most=3)
        raise UserError(f"{reference!r} is neither a recipe nor a run in {runs_dir}; {hint}")
    snapshot = load_checkpoint(path)
    return run.parse(snapshot.config, origin=str(path)), snapshot


def _draw(check: GradientCheck, name: str, path: Path) -> None:
    from spikefleet import plots

    says = "; ".join(check.findings) or f"first layer / last layer: {check.first_to_last:.3g}"
    with waiting(stderr, "drawing the plot"):
        plots.gradient_flow(check.to_dict()["layers"], f"{name}, {_when(check)}\n{says}", path)


def _print(check: GradientCheck, name: str) -> None:
    columns: list[Column | str] = [
        "layer",
        number("gradient norm"),
        number("weight norm", optional=True),
        number("firing rate"),
        number("lr x gradient / weight"),
    ]
    rows = [
        (
            row.layer,
            f"{row.gradient_norm:.3g}",
            f"{row.weight_norm:.3g}",
            "-" if row.firing_rate is None else f"{row.firing_rate:.3f}",
            f"{row.relative_step:.2g}",
        )
        for row in check.layers
    ]
    print_table(console, columns, rows)
    clipped = f", clipped to {check.clipped_to:.2g} of the gradient" if check.clipped_to < 1 else ""
    say(
        f"{name}, {_when(check)}: first / last layer before neurons {check.first_to_last:.3g}; "
        f"learning rate {check.learning_rate:.3g}{clipped}"
    )
    for finding in check.findings:
        say(f"{name}: {finding}")
    if not check.findings:
        say(f"{name}: gradients reach all layers, and no step is larger than the weights")


def _when(check: GradientCheck) -> str:
    return f"after {check.step:,} steps" if check.step else "at initialisation"
