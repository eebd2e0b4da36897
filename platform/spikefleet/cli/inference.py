"""evaluate, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spikefleet.cli.app import app
from spikefleet.cli.output import console, loading, print_json, say, stderr, writing
from spikefleet.cli.parameters import AsJson, Network, OtherData, RunsDir, SplitName, StoresDir
from spikefleet.cli.tables import number, print_table, text
from spikefleet.status import counting, waiting

_SHOWN_CLASSES = 100


@app.command()
def evaluate(
    network: Network,
    split: Annotated[SplitName, typer.Option(help="Part of the data.")] = "test",
    data: OtherData = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report and its plots.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Evaluate on a GPU.")] = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Measure a trained network on a split of its data."""
    with loading("torch", stderr):
        from spikefleet.inference.trained_network import evaluate_on_split, open_trained_network

    with waiting(stderr, f"opening {network}"):
        trained = open_trained_network(network, runs_dir)
    report = trained.task.report
    with writing(out):
        evaluation = evaluate_on_split(trained, split, stores_dir, stderr, data=data, gpu=gpu)
        with waiting(stderr, "measuring"):
            details = trained.task.details(evaluation.predictions, evaluation.targets)
        if out is not None:
            with waiting(stderr, "drawing plots"):
                report.write(details, evaluation.predictions, evaluation.targets, out)
    if as_json:
        print_json({"network": network, "split": split, **details, "spikes": dict(evaluation.health)})
        return
    say(f"{network} on {details['samples']} {split} samples")
    header, *rows = report.table(details)
    if len(rows) > _SHOWN_CLASSES:
        rows = [*rows[:_SHOWN_CLASSES], ("...", *("" for _ in header[1:]))]
    print_table(console, [header[0], *map(number, header[1:])], rows)
    for key, value in details["metrics"].items():
        say(f"{key} {value:.2%}")
    if evaluation.health:
        say(f"firing rate {evaluation.health['firing_rate']:.3f} of the spikes that are possible")
    if out is not None:
        say(f"report: {out}")


@app.command()
def predict(
    network: Network,
    images: Annotated[list[Path], typer.Argument(help="Image files or folders of them.")],
    out: Annotated[
        Path | None,
        typer.Option(help="A .png with all images; for detection, a folder for images with boxes, or a .png of one."),
    ] = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Detection: least score of a box.")] = 0.3,
    gpu: Annotated[bool, typer.Option("--gpu", help="Predict on a GPU.")] = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Classify images, or find objects in them."""
    with loading("torch", stderr):
        from spikefleet.inference.prediction import predict_files
        from spikefleet.inference.trained_network import open_trained_network

    with waiting(stderr, f"opening {network}"):
        trained = open_trained_network(network, runs_dir)
    with writing(out), counting(stderr, "predicting") as progress:
        answers = predict_files(trained, images, out=out, gpu=gpu, score=score, progress=progress)
    if as_json:
        print_json(answers)
        return
    header, *rows = trained.task.report.answer_table(answers)
    print_table(console, [*header[:-1], text(header[-1])], rows)
    if out is not None:
        say(f"drawn: {out}")
