"""predict."""

from __future__ import annotations

import codecs
import csv
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikefleet.cli.app import app
from spikefleet.cli.output import console, loading, print_json_line, say, stderr
from spikefleet.cli.parameters import AsJson, Network, OfDeployed, RunsDir
from spikefleet.errors import RunError, UserError
from spikefleet.status import counting, one_line, print_line, waiting
from spikefleet_tune.messages import counted

if TYPE_CHECKING:
    from spikefleet.inference.trained_network import TrainedNetwork
    from spikefleet.tasks.task import AnyTask

_FILES = "Files"
_OVERLAP = 0.2
_OF_IMAGES = ("image", "frame", "time_s")
_OF_RECORDINGS = ("recording", "start_us", "end_us")

Answered = Callable[[Mapping[str, Any]], None]


@app.command()
def predict(
    network: Network,
    images: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders, patterns, URIs (s3://BUCKET/photos), videos, or - for a list "
            "on stdin; of a network of events, recordings or stores."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="A .png with all images; for detection, a folder for images with boxes, or a .png of one."),
    ] = None,
    crops: Annotated[
        Path | None,
        typer.Option(help="Detection: a folder for each object as a PNG, by class.", rich_help_panel=_FILES),
    ] = None,
    yolo: Annotated[
        Path | None,
        typer.Option(help="Detection: a folder for labels in YOLO's format (no scores).", rich_help_panel=_FILES),
    ] = None,
    coco: Annotated[
        Path | None,
        typer.Option(
            help="Detection: a file for images and boxes in COCO's format, with scores.", rich_help_panel=_FILES
        ),
    ] = None,
    score: Annotated[
        float, typer.Option("--score", "--confidence", min=0, max=1, help="Detection: least score of a box.")
    ] = 0.3,
    nms: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Detection: overlap above which the worse box of a class goes; the network's."),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(min=16, help="Detection: see large images in overlapping tiles of this side, in their pixels."),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(min=0, max=0.9, help="Of neighbouring tiles, at least this fraction of the side; 0.2."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="The most images or tiles that the network sees at once.")] = 1,
    every: Annotated[int | None, typer.Option(min=1, help="Of a video, every so many-th frame; all of them.")] = None,
    window: Annotated[
        str | None, typer.Option(help="Recordings of events: an answer for each window of this length, such as 250ms.")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Recordings of events: carry the membranes from each window to the next."),
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Recordings of events: what their files do not say, such as time=ms; as the training's by default."
        ),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Of folders, predict the images in sub-folders too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Predict on a GPU.")] = False,
    precision: OfDeployed = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout, messages on stderr.")] = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Classify images or recordings of events, or find objects in them: an answer a line, as they come.

    With --json each is a JSON object; with --csv rows of one table. Those of recordings are for a window, with its
    start and end. Rate and remaining time are on stderr.

    Files that cannot be read are named at the end, with exit code 1; the other images are answered.
    """
    if as_json and as_csv:
        raise UserError("--json and --csv are two forms of the answers; give one of them")
    with loading("torch", stderr):
        from spikefleet.inference.image_lists import list_of_images
        from spikefleet.inference.prediction import Written, predict_files
        from spikefleet.inference.predictor import Predictor
        from spikefleet.inference.tiles import Tiling
        from spikefleet.inference.trained_network import in_precision, open_trained_network

    with waiting(stderr, f"opening {network}"):
        trained = open_trained_network(network, runs_dir)
        if precision is not None:
            trained = in_precision(trained, precision)
    form = "json" if as_json else "csv" if as_csv else "text"
    if trained.config.data.transform.reads_events:
        given = {
            "--recursive": recursive,
            "--crops": crops,
            "--yolo": yolo,
            "--coco": coco,
            "--nms": nms,
            "--tile": tile,
            "--overlap": overlap,
            "--every": every,
            "--batch": None if batch == 1 else batch,
        }
        if wrong := [option for option, value in given.items() if value not in (None, False)]:
            raise UserError(f"{wrong[0]} is for images; name each folder of recordings, and leave it out")
        _predict_recordings(trained, images, window, stream, out, force, gpu, score, form, _key_values(option or []))
        return
    if window is not None or stream or option:
        given_option = f"--option {option[0]}" if option else "--stream" if window is None else f"--window {window}"
        raise UserError(f"{given_option} is for networks of events, and {network} is one of images; leave it out")
    if overlap is not None and tile is None:
        raise UserError(f"--overlap {overlap:g} is of tiles; give their side with --tile, or leave it out")
    trained = _with_thresholds(trained, score, nms)
    listed = _listed() if "-" in images else None
    found = list_of_images(images, listed=listed, recursive=recursive, every=every or 1)
    if every is not None and not found.has_videos:
        raise UserError(f"--every {every} is for the frames of videos, and there is no video; leave it out")
    tiling = None if tile is None else Tiling(tile, _OVERLAP if overlap is None else overlap)
    predictor = Predictor(trained, gpu=gpu, score=score, batch=batch, tiling=tiling)
    began = time.monotonic()
    # On a terminal the answers are between the lines of progress, where a bar would be drawn over them.
    with counting(stderr, "predicting", plain=console.is_terminal) as progress:
        done = predict_files(
            trained,
            found,
            predictor,
            written=Written(out, crops, yolo, coco, force),
            progress=progress,
            answered=_printing(trained.task, form, _OF_IMAGES),
        )
    if done.answered and form == "text":
        for place in (out, crops, yolo, coco):
            if place is not None:
                say(f"{'drawn' if place == out else 'written'}: {place}")
    if done.not_drawn:
        print_line(
            stderr,
            f"{counted(done.not_drawn, 'image')} {'is' if done.not_drawn == 1 else 'are'} not drawn: {out} holds the "
            f"first {done.answered - done.not_drawn:,}",
        )
    if done.answered > 1:
        seconds = time.monotonic() - began
        print_line(stderr, f"{done.answered:,} images in {seconds:.3g} s, {done.answered / seconds:.3g} images/s")
    if found.unused:
        print_line(stderr, f"not used: {found.summary}{'' if recursive else '; --recursive reads sub-folders'}")
    _report_bad("image", "images", done.bad, done.answered)


def _with_thresholds(trained: TrainedNetwork, score: float, nms: float | None) -> TrainedNetwork:
    from spikefleet.inference.predictor import least_score, with_overlap_threshold

    if trained.task.finds_boxes and score < (least := least_score(trained)):
        print_line(
            stderr,
            f"--score {score:g} is below the network's own threshold of {least:g} (model.criterion.score_threshold), "
            "which holds",
        )
    return trained if nms is None else with_overlap_threshold(trained, nms)


def _listed() -> Iterator[str]:
    """Paths on stdin, one a line, or ended by zero bytes as `find -print0` has them.

    Raises:
        UserError: the list is of UTF-16.
    """
    content = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError("-: the list on stdin is UTF-16, as PowerShell writes it; write it as UTF-8")
    for one in content.split(b"\0" if b"\0" in content else b"\n"):
        yield os.fsdecode(one.removesuffix(b"\r"))


def _printing(task: AnyTask, form: str, origin: Sequence[str]) -> Answered:
    """What prints each answer in the form that is asked for."""
    if form == "json":
        return print_json_line
    report = task.report
    if form == "csv":
        _print_row((*origin, *report.csv_columns(), "error"))

    def as_rows(answer: Mapping[str, Any]) -> None:
        first = [answer.get(key, "") for key in origin]
        if "error" in answer:
            _print_row((*first, *("" for _ in report.csv_columns()), answer["error"]))
            return
        for row in report.csv_rows({key: value for key, value in answer.items() if key not in origin}):
            _print_row((*first, *row, ""))

    def as_text(answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            return
        header, *rows = report.answer_table([{**answer, "image": _shown(answer)}])
        for row in rows:
            cells = zip(header[1:], row[1:], strict=True)
            say(f"{one_line(row[0])}: {', '.join(f'{name} {one_line(cell)}' for name, cell in cells if cell)}")

    return as_rows if form == "csv" else as_text


def _print_row(cells: Sequence[object]) -> None:
    """A row of CSV on stdout, at once; names as one line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(
        [one_line(cell) if isinstance(cell, str) else cell for cell in cells]
    )
    sys.stdout.write(text.getvalue())
    sys.stdout.flush()


def _shown(answer: Mapping[str, Any]) -> str:
    if "recording" in answer:
        from spikefleet.inference.event_prediction import shown_times

        return f"{answer['recording']}, {shown_times(answer['start_us'], answer['end_us'])}"
    return answer["image"] if "frame" not in answer else f"{answer['image']} frame {answer['frame']}"


def _predict_recordings(
    trained: TrainedNetwork,
    paths: Sequence[str],
    window: str | None,
    stream: bool,
    out: Path | None,
    force: bool,
    gpu: bool,
    score: float,
    form: str,
    options: Mapping[str, str],
) -> None:
    from spikefleet.inference.event_prediction import predict_recordings

    trained_on = trained.config.train.stream
    if trained_on is not None and trained_on.state == "carried" and not stream:
        print_line(
            stderr,
            f"{trained.reference} was trained with membranes that outlive a window (train.stream); here each window "
            "starts from the reset state. --stream carries them, as its evaluation does",
        )
    answered = _printing(trained.task, form, _OF_RECORDINGS)
    places = [Path(path) for path in paths]
    done = predict_recordings(
        trained,
        places,
        window=window,
        stream=stream,
        out=out,
        force=force,
        gpu=gpu,
        score=score,
        options=options,
        answered=answered,
    )
    if out is not None and done.answers and form == "text":
        say(f"drawn: {out}")
    _report_bad("recording", "recordings", [(str(path), reason) for path, reason in done.bad], len(done.answers), False)


def _key_values(options: Sequence[str]) -> dict[str, str]:
    """Raises UserError where one is not of the form key=value."""
    pairs = [item.partition("=") for item in options]
    if wrong := [item for item, (_, equals, _) in zip(options, pairs, strict=True) if not equals]:
        raise UserError(f"--option {wrong[0]!r} is not of the form key=value, for example time=ms")
    return {key: value for key, _, value in pairs}


def _report_bad(one: str, several: str, bad: Sequence[tuple[str, str]], answered: int, of_total: bool = True) -> None:
    """Names what could not be read. Raises UserError where it was the only one, RunError otherwise."""
    if not bad:
        return
    if not answered and len(bad) == 1:
        file, reason = bad[0]
        raise UserError(f"{one} {file} cannot be read: {reason}")
    named = "".join(f"\n  {one_line(file)}: {one_line(reason)}" for file, reason in bad)
    count = f"{len(bad)} of {len(bad) + answered}" if of_total else f"{len(bad)}"
    raise RunError(f"{count} {several} cannot be read; the others are answered:{named}")
