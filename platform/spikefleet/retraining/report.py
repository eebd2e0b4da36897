"""The report of a retraining: the outcome, the gates, what the two networks answer differently, drift."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikefleet.files import write_json
from spikefleet.gates.judging import Verdict
from spikefleet.gates.measuring import Measured
from spikefleet.retraining.drift import DriftReport
from spikefleet.retraining.record import Record
from spikefleet.tasks.per_image import Answers, Boxes
from spikefleet.tasks.resampled_map import Matches
from spikefleet_tune.atomic import write_atomically
from spikefleet_tune.messages import counted

REPORT = "report.md"
GATES = "gates.json"
DRIFT = "drift.json"
DRIFT_PLOT = "drift.png"

_SHOWN_IMAGES = 16
_COMPARED_IMAGES = 500
"""Detection: the first images among which those with different answers are looked for."""


def write_comparison(folder: Path, verdict: Verdict, candidate: Measured, champion: Measured | None) -> None:
    """Writes the gates, both evaluations with their confusion matrices, and the images that only one has right.

    Args:
        folder: of the report.
        verdict: of the gates.
        candidate: on the gate images.
        champion: on the gate images; None where there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in (("candidate", candidate), ("champion", champion)):
        if one is not None:
            evaluation = one.evaluation
            one.task.report.write(
                {**one.details, "split": evaluation.split}, evaluation.predictions, evaluation.targets, folder / name
            )
    if champion is not None:
        gained, lost = _differing(candidate, champion)
        _draw(candidate, gained, folder / "only_candidate_right.png")
        _draw(champion, lost, folder / "only_champion_right.png")
    write_json(folder / GATES, verdict.to_json())


def _differing(candidate: Measured, champion: Measured) -> tuple[list[int], list[int]]:
    """Gate images that the candidate alone has right, and that the champion alone has right; the clearest first."""
    ours, theirs = candidate.results, champion.results
    if isinstance(ours, Answers) and isinstance(theirs, Answers):
        gain = ours.right.astype(np.float64) - theirs.right
        sureness = ours.score + theirs.score
    elif isinstance(ours, Boxes) and isinstance(theirs, Boxes):
        gain = _by_image(candidate, ours) - _by_image(champion, theirs)
        sureness = np.abs(gain)
    else:
        return [], []
    order = np.argsort(-sureness, kind="stable")
    return (
        [int(row) for row in order if gain[row] > 0][:_SHOWN_IMAGES],
        [int(row) for row in order if gain[row] < 0][:_SHOWN_IMAGES],
    )


def _by_image(measured: Measured, boxes: Boxes) -> NDArray[np.float64]:
    """The mAP of each of the first images, without those that have no object, [n]."""
    count = min(_COMPARED_IMAGES, len(boxes.targets))
    first = Boxes(boxes.found[:count], boxes.targets[:count], boxes.max_detections)
    matches = Matches(*first.coco(measured.data.class_names, measured.data.category_ids), first.max_detections)
    return np.nan_to_num(matches.mean_average_precision(np.eye(count, dtype=np.int64)))


def _draw(measured: Measured, rows: Sequence[int], path: Path) -> None:
    path.unlink(missing_ok=True)
    if not rows:
        return
    split, evaluation = measured.gate, measured.evaluation
    measured.task.report.draw(
        [split.image(row) for row in rows],
        [evaluation.predictions[row] for row in rows],
        [evaluation.targets[row] for row in rows],
        path,
    )


def write_report(folder: Path, record: Record, drift: DriftReport | None) -> Path:
    """Writes `report.md` from what was recorded.

    Args:
        folder: of the report.
        record: of the retraining, with its outcome.
        drift: of the new data; None if the data are those of the champion.

    Returns:
        The file.
    """
    lines = [f"# Retraining {record.id}", "", f"**{record.word}**: {record.reason}", ""]
    lines += ["| | |", "|---|---|", f"| model | {record.model} |", f"| started | {record.started} |"]
    lines += [f"| because | {_cell(reason)} |" for reason in record.reasons]
    lines += [
        f"| champion before | {'none' if record.champion is None else f'version {record.champion}'} |",
        f"| candidate | {'none' if record.candidate is None else f'version {record.candidate}'} |",
        f"| trainings | {', '.join(record.runs) or 'none'} |",
    ]
    scores = [score for score in record.scores if score is not None]
    if len(scores) > 1:
        spread = f"{statistics.mean(scores):.2%} +- {statistics.stdev(scores):.2%}"
        lines.append(f"| validation over {counted(len(scores), 'seed')} | {spread} |")
    lines += ["", *_gates(record), *_images(folder)]
    if drift is not None:
        lines += ["## New data against the champion's", "", drift.markdown(), "", f"![drift]({DRIFT_PLOT})", ""]
    if record.word == "promoted":
        lines += ["## Undo", "", f"    spikefleet registry rollback {record.model} --why TEXT", ""]
    path = folder / REPORT
    write_atomically(path, "\n".join(lines))
    return path


def _gates(record: Record) -> list[str]:
    if record.verdict is None:
        return []
    verdict = record.verdict
    lines = ["## Gates", "", f"On {verdict['images']:,} gate images, comparison {verdict['comparisons']} on them.", ""]
    lines += ["| gate | passed | why |", "|---|---|---|"]
    lines += [
        f"| {gate['name']} | {'yes' if gate['passed'] else '**no**'} | {_cell(gate['sentence'])} |"
        for gate in verdict["gates"]
    ]
    if verdict["interval"] is not None:
        low, high = verdict["interval"]
        lines += ["", f"Gain: 95 % interval {low:+.2%} to {high:+.2%} (paired bootstrap)."]
    lines += ["", *(f"Warning: {warning}." for warning in verdict["warnings"]), ""]
    return lines


def _images(folder: Path) -> list[str]:
    lines = []
    for name, title in (
        ("candidate/confusion.png", "Confusion of the candidate"),
        ("champion/confusion.png", "Confusion of the champion"),
        ("only_candidate_right.png", "What only the candidate has right"),
        ("only_champion_right.png", "What only the champion has right"),
    ):
        if (folder / name).is_file():
            lines += [f"## {title}", "", f"![{title}]({name})", ""]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
