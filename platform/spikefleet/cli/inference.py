"""evaluate, predict."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikefleet.cli.app import app
from spikefleet.cli.output import console, loading, print_json, print_json_line, say, stderr
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
from spikefleet.errors import RunError, UserError
from spikefleet.outputs import check_outputs
from spikefleet.status import counting, one_line, print_line, uncounted, waiting

if TYPE_CHECKING:
    from spikefleet.inference.trained_network import TrainedNetwork

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


@app.command()
def predict(
    network: Network,
    images: Annotated[
        list[Path],
        typer.Argument(help="Image files or folders of them; of a network of events, recordings or stores."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="A .png with all images; for detection, a folder for images with boxes, or a .png of one."),
    ] = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Detection: least score of a box.")] = 0.3,
    window: Annotated[
        str | None, typer.Option(help="Recordings of events: an answer for each window of this length, such as 250ms.")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Recordings of events: carry the membranes from each window to the next."),
    ] = False,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Of folders, predict the images in sub-folders too.")
    ] = False,
    force: Force = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Predict on a GPU.")] = False,
    precision: OfDeployed = None,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Classify images or recordings of events, or find objects in them: an answer a line, as they come.

    With --json each is a JSON object; those of recordings are for a window, with its start and end.

    Files that cannot be read are named at the end, with exit code 1; the other images are answered.
    """
    with loading("torch", stderr):
        from spikefleet.inference.prediction import predict_files
        from spikefleet.inference.trained_network import in_precision, open_trained_network

    with waiting(stderr, f"opening {network}"):
        trained = open_trained_network(network, runs_dir)
        if precision is not None:
            trained = in_precision(trained, precision)
    report = trained.task.report
    if trained.config.data.transform.reads_events:
        if recursive:
            raise UserError("--recursive is for images; name each folder of recordings")
        _predict_recordings(trained, images, window, stream, out, force, gpu, score, as_json)
        return
    if window is not None or stream:
        given = "--stream" if window is None else f"--window {window}"
        raise UserError(f"{given} is for networks of events, and {network} is one of images; leave it out")

    def answered(answer: Mapping[str, Any]) -> None:
        if as_json:
            print_json_line(answer)
        elif "error" not in answer:
            header, *rows = report.answer_table([answer])
            for row in rows:
                cells = zip(header[1:], row[1:], strict=True)
                say(f"{one_line(row[0])}: {', '.join(f'{name} {one_line(cell)}' for name, cell in cells if cell)}")

    # On a terminal the answers are the progress, and a bar would be drawn between them.
    with nullcontext(uncounted) if console.is_terminal else counting(stderr, "predicting") as progress:
        done = predict_files(
            trained,
            images,
            out=out,
            force=force,
            recursive=recursive,
            gpu=gpu,
            score=score,
            progress=progress,
            answered=answered,
        )
    if out is not None and done.answers and not as_json:
        say(f"drawn: {out}")
    if done.unused:
        print_line(stderr, f"not used: {done.unused}{'' if recursive else '; --recursive reads sub-folders'}")
    if not done.bad:
        return
    if not done.answers and len(done.bad) == 1:
        file, reason = done.bad[0]
        raise UserError(f"image {file} cannot be read: {reason}")
    named = "".join(f"\n  {one_line(str(file))}: {one_line(reason)}" for file, reason in done.bad)
    total = len(done.bad) + len(done.answers)
    raise RunError(f"{len(done.bad)} of {total} images cannot be read; the others are answered:{named}")


def _predict_recordings(
    trained: TrainedNetwork,
    paths: list[Path],
    window: str | None,
    stream: bool,
    out: Path | None,
    force: bool,
    gpu: bool,
    score: float,
    as_json: bool,
) -> None:
    from spikefleet.inference.event_prediction import predict_recordings, shown_times

    def answered(answer: Mapping[str, Any]) -> None:
        if as_json:
            print_json_line(answer)
        elif "error" not in answer:
            times = shown_times(answer["start_us"], answer["end_us"])
            header, *rows = trained.task.report.answer_table([{**answer, "image": f"{answer['recording']}, {times}"}])
            for row in rows:
                cells = zip(header[1:], row[1:], strict=True)
                say(f"{one_line(row[0])}: {', '.join(f'{name} {one_line(cell)}' for name, cell in cells if cell)}")

    done = predict_recordings(
        trained, paths, window=window, stream=stream, out=out, force=force, gpu=gpu, score=score, answered=answered
    )
    if out is not None and done.answers and not as_json:
        say(f"drawn: {out}")
    if not done.bad:
        return
    if not done.answers and len(done.bad) == 1:
        file, reason = done.bad[0]
        raise UserError(f"recording {file} cannot be read: {reason}")
    named = "".join(f"\n  {one_line(str(file))}: {one_line(reason)}" for file, reason in done.bad)
    raise RunError(f"{len(done.bad)} recordings cannot be read; the others are answered:{named}")
