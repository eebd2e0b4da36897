"""spike-check, energy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from spikefleet.cli.app import Network, RunsDir, StoresDir, app, console
from spikefleet.config.messages import did_you_mean
from spikefleet.config.recipes import list_recipes, load_config, override_model, parse_overrides
from spikefleet.errors import RunError, UserError

if TYPE_CHECKING:
    from torch import nn


@app.command("spike-check")
def spike_check(
    network: Network,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Part of the data.")] = "test",
    pictures: Annotated[int, typer.Option(min=1, help="Pictures for the proof and the flip counts.")] = 2,
    measured: Annotated[int, typer.Option(min=0, help="Pictures for the figures of both forms; 0 for none.")] = 256,
    data: Annotated[str | None, typer.Option(help="Another store than the one that the configuration names.")] = None,
    out: Annotated[Path, typer.Option(help="File for the proof.")] = Path("spike_check.json"),
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Prove that binary, spike-driven inference equals the network that was trained, layer by layer.

    Both forms run in fp64 and every layer is compared bit by bit; then rounding is counted in fp32 and bf16, and what
    it does to the figures is measured. Exit code 1 if they differ.
    """
    from spikefleet.certificates.spike_check import check_spikes
    from spikefleet.inference.trained_network import open_split, open_trained_network

    trained = open_trained_network(network, runs_dir)
    rows = open_split(trained, split, stores_dir, console, data=data)
    check = check_spikes(
        trained.network, trained.task, trained.config, rows, pictures=pictures, measured=min(measured, len(rows))
    )
    check.write(out)
    if check.proof is not None:
        table = Table("layer", "kind", "T", "D", "equal", "0/1 only", "ones", "spare bits")
        for layer in check.proof.layers:
            table.add_row(
                layer.name,
                layer.kind,
                _shown(layer.timesteps),
                _shown(layer.bound),
                "yes" if layer.equal else f"no ({layer.max_difference:.3g})",
                {None: "-", True: "yes", False: "no"}[layer.binary],
                "-" if layer.ones is None else f"{layer.ones:.1%}",
                _shown(layer.headroom_bits),
            )
        console.print(table)
    for count in check.flips:
        console.print(
            f"{count.dtype}: {count.flipped:,} of {count.emitted:,} emitted integers differ; "
            f"outputs by at most {count.max_output_difference:.3g}",
            highlight=False,
        )
    if check.figures is not None:
        for name, integer in check.figures["integer"].items():
            binary = check.figures["binary"][name]
            console.print(f"{name}: integer {integer:.4%}, binary {binary:.4%} (fp32)", highlight=False)
    if check.remark is not None:
        console.print(f"flips and figures are missing: {check.remark}", highlight=False)
    console.print(f"proof: {out}", highlight=False, soft_wrap=True)
    if check.verdict == "refuted":
        raise RunError(f"{network}: the binary form is not equal to the network: {check.why}")
    if check.verdict == "not spiking":
        console.print(f"{network} has no spiking neurons, so there is nothing to prove", highlight=False)
        return
    console.print(f"{network}: every layer is equal in both forms", highlight=False)


@app.command()
def energy(
    network: Network,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="For the name of a model or recipe: dotted overrides, for example model.num_classes=100."),
    ] = None,
    constants: Annotated[str, typer.Option(help="fp32-45nm (MAC 4.6, AC 0.9 pJ) or int32-45nm (3.1, 0.1).")] = (
        "fp32-45nm"
    ),
    form: Annotated[
        Literal["merged", "factored", "as_built"],
        typer.Option(help="Deployed with merged or kept chains, or as built."),
    ] = "merged",
    shortcuts: Annotated[bool, typer.Option(help="Count the 1x1 convolutions of shortcuts.")] = True,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures on which rates are measured.")] = 32,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Part of the data.")] = "val",
    data: Annotated[str | None, typer.Option(help="Another store than the one that the configuration names.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0, help="For the name of a model or recipe: mean input of layers that spikes feed."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="For the name of a model or recipe: side of the pictures.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for energy.json and its picture.")] = None,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Operations and estimated energy of one picture, layer by layer, from measured firing rates.

    With --rate, NETWORK is the name of a model (spike_yolo_s) or recipe (cifar100_sg_resnet18), and nothing is run.
    """
    from spikefleet.certificates.energy_card import measure_energy, write_card
    from spikefleet.inference.trained_network import open_split, open_trained_network
    from spikefleet_models.energy import energy_at_rates

    try:
        if rate is not None:
            if size is None:
                raise UserError("--rate counts a network that sees no data: give the side of its pictures by --size")
            card = energy_at_rates(_untrained(network, overrides or []), (size, size), rate, constants, form, shortcuts)
        elif overrides:
            raise UserError(
                f"{overrides[0]}: a trained network has the configuration that it was trained by; "
                "overrides are for the name of a model or recipe, with --rate"
            )
        else:
            trained = open_trained_network(network, runs_dir)
            rows = open_split(trained, split, stores_dir, console, data=data)
            card = measure_energy(
                trained.network,
                trained.config.data.transform,
                rows,
                images=pictures,
                constants=constants,
                form=form,
                shortcuts=shortcuts,
            )
    except ValueError as error:
        raise UserError(str(error)) from None
    table = Table("layer", "operation", "input", "dense", "mean input", "MACs", "ACs", "mJ", "share")
    for row in card.rows():
        table.add_row(
            row["layer"],
            row["operation"],
            row["input"],
            f"{row['dense']:,.0f}",
            "-" if row["mean_input"] is None else f"{row['mean_input']:.4f}",
            f"{row['macs']:,.0f}",
            f"{row['acs']:,.0f}",
            f"{row['energy_mj']:.4g}",
            f"{row['share']:.1%}",
        )
    console.print(table)
    counted = "with" if card.shortcuts else "without"
    console.print(
        f"{card.network}, {card.form}, {counted} 1x1 shortcuts, T={card.timesteps}, D={card.bound}, "
        f"{card.image_size[0]}x{card.image_size[1]}: {card.macs:,.0f} MACs, {card.acs:,.0f} ACs, "
        f"{card.energy_mj:.4g} mJ a picture ({card.constants.name})",
        highlight=False,
    )
    if card.twin is not None and card.twin_ratio is not None:
        console.print(
            f"ANN twin ({card.twin.form}): {card.twin.macs:,.0f} MACs, {card.twin_energy_mj:.4g} mJ, "
            f"{card.twin_ratio:.2f} times as much",
            highlight=False,
        )
    if out is not None:
        write_card(card, out)
        console.print(f"card: {out}", highlight=False, soft_wrap=True)


def _untrained(name: str, overrides: Sequence[str]) -> nn.Module:
    """A network without weights, of a recipe or of a named model. Raises UserError or ValueError."""
    import torch

    from spikefleet_models.families import build_model, list_models, model_config

    changes = parse_overrides(overrides)
    if name in list_models():
        config = override_model(model_config(name), changes, name)
    elif name in list_recipes() or name.endswith((".yaml", ".yml")):
        config = load_config(name, changes).model
    else:
        known = [*list_models(), *list_recipes()]
        hint = did_you_mean(name, known, "`spikefleet recipes` lists the recipes", most=3)
        raise UserError(f"{name!r} is neither a model nor a recipe; {hint}")
    with torch.device("meta"):
        return build_model(config)


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)
