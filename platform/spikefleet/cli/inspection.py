"""spike-check, energy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from spikefleet.cli.app import app
from spikefleet.cli.completion import override_keys
from spikefleet.cli.output import console, loading, print_json, say, stderr
from spikefleet.cli.parameters import (
    AsJson,
    Force,
    Network,
    OtherData,
    RunsDir,
    SplitName,
    StoresDir,
    Weights,
)
from spikefleet.cli.tables import Column, number, print_table
from spikefleet.errors import RunError, UserError
from spikefleet.outputs import check_outputs
from spikefleet.status import counting, waiting
from spikefleet_tune.messages import counted

if TYPE_CHECKING:
    from torch import nn

    from spikefleet.certificates.spike_check import SpikeCheck
    from spikefleet_models.energy import EnergyCard

Form = Literal["merged", "factored", "as_built"]


@app.command("spike-check")
def spike_check(
    network: Network,
    split: Annotated[SplitName, typer.Option(help="Part of the data.")] = "test",
    images: Annotated[
        int, typer.Option(min=2, help="Images to look at, at most, for some on which every layer fires.")
    ] = 256,
    measured: Annotated[int, typer.Option(min=0, help="Images for the metrics of both forms; 0 for none.")] = 256,
    precision: Weights = "fp32",
    data: OtherData = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the proof; that of the run's report, else spike_check.json here.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Prove that binary, spike-driven inference equals the network that was trained, layer by layer.

    In fp64 the trained network is compared with its deployed form, and that with its binary form, bit by bit; then
    rounding is counted in fp32 and bf16, and the metrics of both are measured. With --precision the deployed form has
    rounded weights, and the integers that they change are counted. Exit code 1 if the forms differ, or if the output is
    the same for every image, so that nothing is shown.
    """
    with loading("torch", stderr):
        from spikefleet.certificates.spike_check import check_spikes, proof_file
        from spikefleet.inference.trained_network import in_precision, open_split, open_trained_network

    with waiting(stderr, f"opening {network}"):
        trained = open_trained_network(network, runs_dir)
    path = out or (trained.report or Path()) / proof_file(precision)
    check_outputs([path], inputs=trained.folders, force=force)
    rows = open_split(trained, split, stores_dir, stderr, data=data)
    if precision != "fp32":
        in_precision(trained, precision)  # refuses a network of which nothing can be rounded
    with counting(stderr, "proving and measuring") as progress:
        check = check_spikes(
            trained.network,
            trained.task,
            trained.config,
            rows,
            images=images,
            measured=min(measured, len(rows)),
            precision=precision,
            progress=progress,
        )
    check.write(path)
    if as_json:
        print_json(check.to_dict())
    else:
        _print_check(check, path)
    if check.verdict == "refuted":
        raise RunError(f"{network}: the binary form is not equal to the network: {check.why}")
    if check.verdict == "not shown":
        raise RunError(f"{network}: nothing is shown: {check.why}")
    if not as_json:
        proved = check.verdict != "not spiking"
        says = "every layer is equal in both forms" if proved else "it has no spiking neurons, so nothing is to prove"
        say(f"{network}: {says}")


def _print_check(check: SpikeCheck, out: Path) -> None:
    if check.proof is not None:
        columns: list[Column | str] = [
            "layer",
            "kind",
            number("T"),
            number("D"),
            "equal",
            "0/1 only",
            number("ones", optional=True),
            number("spare bits", optional=True),
        ]
        rows = [
            (
                layer.name,
                layer.kind,
                _shown(layer.timesteps),
                _shown(layer.bound),
                "yes" if layer.equal else f"no ({layer.max_difference:.3g})",
                {None: "-", True: "yes", False: "no"}[layer.binary],
                "-" if layer.ones is None else f"{layer.ones:.1%}",
                _shown(layer.headroom_bits),
            )
            for layer in check.proof.layers
        ]
        print_table(console, columns, rows)
    for count in check.flips:
        say(
            f"{count.dtype}: {count.flipped:,} of {count.emitted:,} emitted integers differ; "
            f"outputs by at most {count.max_output_difference:.3g}"
        )
    if check.rounding is not None:
        say(
            f"weights in {check.precision}: {check.rounding.differing:,} of {check.rounding.emitted:,} emitted "
            f"integers differ from fp32 ({check.rounding.share:.3%})"
        )
    for leg in check.legs:
        say(leg.says)
    if check.silent is not None:
        say(f"compared alone, since no spike came there on these images: {check.silent}")
    if check.metrics is not None:
        others = {name: value for name, value in check.metrics.trained.items() if name != check.metrics.metric}
        for name, trained in others.items():  # the one that decides is told by its leg
            say(f"{name}: trained {trained:.4%}, binary {check.metrics.binary[name]:.4%} (fp32)")
    if check.remark is not None:
        say(f"flips were not counted: {check.remark}")
    say(f"proof: {out}")


@app.command()
def energy(
    network: Network,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="For the name of a model or recipe: dotted overrides, for example model.num_classes=100.",
            autocompletion=override_keys,
        ),
    ] = None,
    constants: Annotated[
        str | None,
        typer.Option(
            help="fp32-45nm (MAC 4.6, AC 0.9 pJ), int32-45nm (3.1, 0.1) or int8-45nm (4.6, 0.1: int8 weights, real "
            "values in fp32). If not given, fp32-45nm, or int8-45nm with --precision int8."
        ),
    ] = None,
    precision: Weights = "fp32",
    form: Annotated[Form, typer.Option(help="Deployed with merged or kept chains, or as built.")] = "merged",
    shortcuts: Annotated[bool, typer.Option(help="Count the 1x1 convolutions of shortcuts.")] = True,
    images: Annotated[int, typer.Option(min=1, help="Images on which rates are measured.")] = 32,
    split: Annotated[SplitName, typer.Option(help="Part of the data.")] = "val",
    data: OtherData = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0, help="For the name of a model or recipe: mean input of layers that spikes feed."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="For the name of a model or recipe: side of the images.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for energy.json and its plot.")] = None,
    force: Force = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Operations and estimated energy of one image, layer by layer, from measured firing rates.

    With --rate, NETWORK is the name of a model (spike_yolo_s) or recipe (cifar100_sg_resnet18), and nothing is run.
    """
    if rate is not None and size is None:
        raise UserError("--rate counts a network that sees no data: give the side of its images by --size")
    if rate is None and overrides:
        raise UserError(
            f"{overrides[0]}: a trained network has the configuration that it was trained by; "
            "overrides are for the name of a model or recipe, with --rate"
        )
    if rate is not None and precision != "fp32":
        raise UserError("--precision measures rates with rounded weights, and --rate gives them; leave one out")
    if constants is None:
        constants = "int8-45nm" if precision == "int8" else "fp32-45nm"
    with loading("torch", stderr):
        from spikefleet.certificates.energy_card import CARD_FILES, measure_energy, write_card
        from spikefleet.inference.trained_network import open_split, open_trained_network
        from spikefleet_models.energy import energy_at_rates

    files = () if out is None else tuple(out / name for name in CARD_FILES)
    check_outputs(files, force=force)
    try:
        if rate is not None and size is not None:
            with waiting(stderr, "counting operations"):
                untrained, frames = _untrained(network, overrides or [])
                card = energy_at_rates(
                    untrained,
                    (size, size),
                    rate,
                    constants,
                    form,
                    shortcuts,
                    timesteps=frames.steps,
                    binary_input=frames.binary,
                )
        else:
            with waiting(stderr, f"opening {network}"):
                trained = open_trained_network(network, runs_dir)
            check_outputs(files, inputs=trained.folders, force=force)
            rows = open_split(trained, split, stores_dir, stderr, data=data)
            with counting(stderr, "measuring firing rates") as progress:
                card = measure_energy(
                    trained.network,
                    trained.config.transform,
                    rows,
                    images=images,
                    constants=constants,
                    form=form,
                    shortcuts=shortcuts,
                    precision=precision,
                    progress=progress,
                )
    except ValueError as error:
        raise UserError(str(error)) from None
    if out is not None:
        with waiting(stderr, "drawing plots"):
            write_card(card, out)
    if as_json:
        print_json(card.to_dict())
        return
    _print_card(card)
    if out is not None:
        say(f"card: {out}")


def _print_card(card: EnergyCard) -> None:
    columns: list[Column | str] = [
        "layer",
        Column("operation", optional=True),
        Column("input", optional=True),
        number("dense", optional=True),
        number("mean input", optional=True),
        number("MACs"),
        number("ACs"),
        number("energy, mJ"),
        number("share", optional=True),
    ]
    rows = [
        (
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
        for row in card.rows()
    ]
    print_table(console, columns, rows)
    shortcuts = "with" if card.shortcuts else "without"
    weights = "" if card.precision == "fp32" else f", weights in {card.precision}"
    say(
        f"{card.network}, {card.form}{weights}, {shortcuts} 1x1 shortcuts, T={card.timesteps}, D={card.bound}, "
        f"{card.image_size[0]}x{card.image_size[1]}: {card.macs:,.0f} MACs, {card.acs:,.0f} ACs, "
        f"{card.energy_mj:.4g} mJ an image ({card.constants.name})"
    )
    if card.integer_fed:
        say(
            f"{counted(len(card.integer_fed), 'layer')} fed by integers (sums of spikes), which binary spikes cannot "
            f"carry: {card.integer_macs:,.0f} of the MACs"
        )
    if card.twin is not None and card.twin_ratio is not None:
        say(
            f"ANN twin ({card.twin.form}): {card.twin.macs:,.0f} MACs, {card.twin_energy_mj:.4g} mJ, "
            f"{card.twin_ratio:.2f} times as much"
        )


class _Frames(NamedTuple):
    """What a recipe gives to its network."""

    steps: int | None
    """T of event frames; None for images, and for a named model."""
    binary: bool = False
    """Whether frames hold nothing but 0 and 1."""


def _untrained(name: str, overrides: Sequence[str]) -> tuple[nn.Module, _Frames]:
    """A network without weights, of a recipe or of a named model, and its frames. Raises UserError or ValueError."""
    import torch

    from spikefleet.config.messages import did_you_mean
    from spikefleet.config.recipes import list_recipes, load_config, override_model, parse_overrides
    from spikefleet_models.families import build_model, list_models, model_config

    changes = parse_overrides(overrides)
    if name in list_models():
        config, frames = override_model(model_config(name), changes, name), _Frames(None)
    elif name in list_recipes() or name.endswith((".yaml", ".yml")):
        recipe = load_config(name, changes)
        config, transform = recipe.model, recipe.data.transform
        frames = _Frames(config.simulated_timesteps if transform.reads_events else None, transform.binary_input)
    else:
        known = [*list_models(), *list_recipes()]
        hint = did_you_mean(name, known, "`spikefleet recipes` lists the recipes", most=3)
        raise UserError(f"{name!r} is neither a model nor a recipe; {hint}")
    with torch.device("meta"):
        return build_model(config), frames


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)
