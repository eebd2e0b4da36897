"""evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spikefleet.cli.app import app
from spikefleet.cli.output import console, loading, print_json, say, stderr
from spikefleet.cli.parameters import (
    AsJson,
    Force,
    Network,
    OfDeployed,
    OtherData,
    RunsDir,
    SliceOrder,
    SplitName,
    StoresDir,
)
from spikefleet.cli.tables import number, print_table
from spikefleet.outputs import check_outputs
from spikefleet.status import waiting

_SHOWN_CLASSES = 100


@app.command()
def evaluate(
    network: Network,
    split: Annotated[SplitName, typer.Option(help="Part of the data.")] = "test",
    data: OtherData = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report and its plots.")] = None,
    force: Force = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Evaluate on a GPU.")] = False,
    precision: OfDeployed = None,
    slice_order: Annotated[
        list[SliceOrder] | None,
        typer.Option(help="Recordings of events: measure with the time slices in another order too; may be repeated."),
    ] = None,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Measure a trained network on a split of its data.

    With --precision bf16 or int8 it is measured in fp32 too, and the effect of rounding is said.
    """
    with loading("torch", stderr):
        from spikefleet.inference.rounding import rounding_effect
        from spikefleet.inference.trained_network import evaluate_on_split, in_precision, open_trained_network

    with waiting(stderr, f"opening {network}"):
        as_trained = open_trained_network(network, runs_dir)
        trained = as_trained if precision is None else in_precision(as_trained, precision)
    if out is not None:
        check_outputs((out / name for name in trained.task.report.files), inputs=trained.folders, force=force)
    evaluation = evaluate_on_split(trained, split, stores_dir, stderr, data=data, gpu=gpu)
    with waiting(stderr, "measuring"):
        details = evaluation.details(trained.task)
    for order in dict.fromkeys(slice_order or ()):
        changed = evaluate_on_split(trained, split, stores_dir, stderr, data=data, gpu=gpu, slice_order=order.value)
        found = trained.task.metrics(changed.predictions, changed.targets)
        details.setdefault("slice_order", {})[order.value] = found
    effect = None
    if precision is not None:
        details["precision"] = precision
        if precision != "fp32":
            effect = rounding_effect(
                as_trained, evaluation, split, stores_dir, stderr, precision=precision, data=data, gpu=gpu
            )
            details["rounding"] = effect.to_dict()
    report = trained.task.report
    if out is not None:
        with waiting(stderr, "drawing plots"):
            report.write(details, evaluation.predictions, evaluation.targets, out)
    if as_json:
        print_json({"network": network, **details, "spikes": dict(evaluation.health)})
        return
    say(f"{network} on {details['samples']} {evaluation.split} samples")
    header, *rows = report.table(details)
    if len(rows) > _SHOWN_CLASSES:
        rows = [*rows[:_SHOWN_CLASSES], ("...", *("" for _ in header[1:]))]
    print_table(console, [header[0], *map(number, header[1:])], rows)
    for key, value in details["metrics"].items():
        others = ", ".join(
            f"slices {order} {metrics[key]:.2%}"
            for order, metrics in details.get("slice_order", {}).items()
            if key in metrics
        )
        say(f"{key} {value:.2%}" + (f" ({others})" if others else ""))
    if "over_time" in details:
        say("top1 after each time step: " + ", ".join(f"{value:.1%}" for value in details["over_time"]["top1"]))
    for key in ("description", "protocol_remark", "remark"):
        if key in details:
            say(details[key])
    if effect is not None:
        say(effect.sentence)
    if evaluation.health:
        say(f"firing rate {evaluation.health['firing_rate']:.3f} of the spikes that are possible")
    if out is not None:
        say(f"report: {out}")
