"""Events reach the driver through files, also those of an attempt whose driver was killed."""

from __future__ import annotations

import json
import resource
import threading
from pathlib import Path

import pytest

from spikefleet.files import write_json
from spikefleet.training.event_log import STOPPED, EventReader, EventWriter, ResumedRunSink, new_attempt
from spikefleet.training.events import (
    CheckpointSaved,
    EpochDone,
    Event,
    Note,
    Recovered,
    Started,
    StepDone,
    WorkerFailed,
)
from support.events import KeptEvents

EVENTS = [
    Started(3, 10, 5, 2, {"parameters": 7}),
    StepDone(0, 4, {"train/loss": 0.1 + 0.2}),
    EpochDone(1, 5, {"val/top1": 0.5}, True, ({"layer": "stem", "rate": 0.25},), ({"parameter": "w"},)),
    CheckpointSaved(5, "/somewhere"),
    Note("a line\nwith a break"),
    WorkerFailed("rank 1: gone"),
]


def test_events_survive_the_way_through_a_file_and_are_read_once(tmp_path: Path) -> None:
    attempt = new_attempt(tmp_path)
    writer, reader = EventWriter(attempt), EventReader(attempt)
    assert reader.new() == []
    for event in EVENTS[:2]:
        writer.emit(event)
    assert reader.new() == EVENTS[:2]
    for event in EVENTS[2:]:
        writer.emit(event)
    assert reader.new() == EVENTS[2:]
    assert reader.new() == []


def test_the_start_of_an_attempt_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    attempt = new_attempt(tmp_path)
    fields = {"step": 3, "total_steps": 10, "steps_per_epoch": 5, "epochs": 2, "headline": []}
    line = json.dumps({"event": "Started", **fields, "facts": {"parameters": 7}}) + "\n"
    (attempt / "events-1.jsonl").write_text(line)
    assert EventReader(attempt).new() == EVENTS[:1]


def test_an_unfinished_line_waits_for_its_end(tmp_path: Path) -> None:
    attempt = new_attempt(tmp_path)
    line = json.dumps({"event": "Note", "text": "whole"}) + "\n"
    path = attempt / "events-1.jsonl"
    reader = EventReader(attempt)
    path.write_text(line[:9])
    assert reader.new() == []
    path.write_text(line)
    assert reader.new() == [Note("whole")]


def test_a_writer_in_step_goes_on_after_a_checkpoint_when_all_is_handed_on(tmp_path: Path) -> None:
    attempt = new_attempt(tmp_path)
    writer, reader = EventWriter(attempt, lockstep=True), EventReader(attempt)
    writer.emit(EVENTS[2])  # an epoch: does not wait

    def save() -> threading.Thread:
        thread = threading.Thread(target=writer.emit, args=(EVENTS[3],))
        thread.start()
        return thread

    saving = save()
    read: list[Event] = []
    while EVENTS[3] not in read:
        read += reader.new()
    saving.join(0.2)
    assert saving.is_alive(), "read, and not yet dealt with"
    reader.acknowledge()
    saving.join(10)
    assert not saving.is_alive()
    stopped = save()
    stopped.join(0.2)
    assert stopped.is_alive()
    write_json(attempt / STOPPED, {})
    stopped.join(10)
    assert not stopped.is_alive(), "an attempt that is stopped waits for nobody"


def test_a_full_disk_stops_no_training(tmp_path: Path) -> None:
    EventWriter(tmp_path / "gone").emit(EVENTS[0])
    attempt = new_attempt(tmp_path)
    writer, reader = EventWriter(attempt), EventReader(attempt)
    writer.emit(EVENTS[0])
    (path,) = attempt.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        writer.emit(EVENTS[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.emit(EVENTS[2])
    assert reader.new() == [EVENTS[0], EVENTS[2]]


@pytest.mark.parametrize("word", ["launch", "attempt"])
def test_events_that_an_earlier_version_left_are_heard_too(tmp_path: Path, word: str) -> None:
    """Attempts were called launches, and Started had no headline."""
    earlier = tmp_path / "ray" / f"{word}-{7:020d}"
    earlier.mkdir(parents=True)
    lines = [{"event": "Started", "step": 0, "total_steps": 9, "steps_per_epoch": 9, "epochs": 1, "facts": {}}]
    lines += [{"event": "StepDone", "epoch": 0, "step": 4, "metrics": {"train/loss": 0.5}}]
    (earlier / "events-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = KeptEvents()
    sink = ResumedRunSink(tmp_path, kept)
    assert (earlier / STOPPED).is_file()
    sink.emit(EVENTS[0])
    assert kept.seen == [Recovered((Started(0, 9, 9, 1), StepDone(0, 4, {"train/loss": 0.5}))), EVENTS[0]]
    assert not earlier.exists()


def test_taking_over_stops_earlier_workers_and_hears_them_out(tmp_path: Path) -> None:
    first, second = new_attempt(tmp_path), new_attempt(tmp_path)
    assert first < second
    EventWriter(first).emit(EVENTS[1])
    kept = KeptEvents()
    sink = ResumedRunSink(tmp_path, kept)
    assert (first / STOPPED).is_file()
    assert (second / STOPPED).is_file()
    EventWriter(second).emit(EVENTS[2])  # an earlier worker may still finish its step
    sink.emit(Note("before the checkpoint is picked"))
    assert len(kept.seen) == 1
    sink.emit(EVENTS[0])
    assert kept.seen[1:] == [Recovered((EVENTS[1],)), Recovered((EVENTS[2],)), EVENTS[0]]
    assert not first.exists()
    sink.emit(EVENTS[0])
    assert kept.seen[4:] == [EVENTS[0]]
