"""A network of events answers alike as a command on a file and a store, and served on lists and on frames."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from rich.console import Console
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.recipes import load_config
from spikefleet.errors import UserError
from spikefleet.inference.event_prediction import predict_recordings
from spikefleet.inference.trained_network import TrainedNetwork, evaluate_on_split, open_trained_network
from spikefleet.runs.options import Options
from spikefleet.runs.train_run import run_training
from spikefleet_pipelines.events.binning_config import BinningConfig
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.representations import bin_events
from spikefleet_pipelines.events.windows import StoredRecording
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_reader import EventSplit
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.reader import Store
from support.event_stores import LENGTH, labelled_store
from support.registered import Trained

SENSOR, T = (12, 16), 3
SMALL = """
task: classification
model: {family: sg_resnet, stages: [1], width: 0.125, in_channels: 2, num_classes: 4, timesteps: 3, decoder: rate}
data:
  source: saccades
  transform: {kind: events, representation: {kind: count}, normalise: {mean: [0.2], std: [0.5]}}
train: {epochs: 2, global_batch: 8}
optim: {lr: 0.1}
registry: {name: moving}
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, runs: Path, first: Trained) -> Path:
    """A directory with a store, beside a run "moving" and a version that is registered as it."""
    folder = tmp_path_factory.mktemp("desk")
    store = labelled_store(folder / "store", "saccades", SENSOR, [120 + 7 * n for n in range(16)], classes=4)
    (folder / "small.yaml").write_text(SMALL)
    config = load_config(str(folder / "small.yaml"), {"data.store": store.location, "cluster.workers": 0})
    run_training(config, Options(runs, folder / "stores"), Console(file=StringIO()), "moving")
    return folder


@pytest.fixture(scope="module")
def trained(desk: Path, runs: Path) -> TrainedNetwork:
    return open_trained_network("moving", runs)


@pytest.fixture(scope="module")
def recordings(desk: Path) -> EventSplit:
    return Store.open(desk / "store").recordings("test")


@pytest.fixture
def served(desk: Path, uri: str) -> Any:
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return mlflow.pyfunc.load_model("models:/moving/1")


def ask(served: Any, inputs: Any) -> tuple[int, Any]:
    """What `mlflow models serve` answers to a POST of JSON to /invocations."""
    body = json.dumps({"inputs": inputs})
    try:
        done = scoring_server.invocations(body, "application/json", served, served.metadata.get_input_schema())
    except MlflowException as error:
        return error.get_http_status_code(), str(error.message)
    return done.status, json.loads(done.response) if done.status == 200 else done.response


def request(recording: StoredRecording, start: int = 0, length: int = LENGTH + 7) -> dict[str, Any]:
    events = recording.window(start, length).events()
    lists = {name: getattr(events, name).tolist() for name in "xyp"}
    return {"t": (events.t - start).tolist(), **lists, "height": 12, "width": 16, "duration": length}


def probabilities(answer: dict[str, Any]) -> dict[str, float]:
    return {one["name"]: one["probability"] for one in answer["classes"]}


def test_file_store_lists_and_frames_get_the_answer_of_the_evaluation(
    desk: Path, trained: TrainedNetwork, recordings: EventSplit, served: Any
) -> None:
    evaluation = evaluate_on_split(trained, "test", desk / "stores", Console(file=StringIO()))
    stored = predict_recordings(trained, [desk / "store"]).answers
    assert [answer["recording"] for answer in stored] == [f"{desk / 'store'} test/{row}" for row in range(16)]
    assert {(answer["start_us"], answer["end_us"]) for answer in stored} == {(0, LENGTH + 7)}
    given = [request(recordings.recording(row)) for row in range(16)]
    windows = (recordings.recording(row).window(0, LENGTH + 7) for row in range(16))
    frames = [bin_events(window, BinningConfig(slices=T)).tolist() for window in windows]
    of_lists, of_frames = ask(served, given), ask(served, frames)
    assert of_lists[0] == of_frames[0] == 200, (of_lists, of_frames)
    for row, answer in enumerate(stored):
        expected = trained.task.report.answer(evaluation.predictions[row])
        assert probabilities(answer) == pytest.approx(probabilities(expected), abs=1e-6)
        for answers in (of_lists[1], of_frames[1]):
            assert answers["predictions"][row] == pytest.approx(probabilities(expected), abs=1e-6)
    turned = ask(served, [np.array(frames[3])[::-1].tolist()])[1]["predictions"][0]
    assert turned != pytest.approx(probabilities(stored[3]), abs=1e-6)


def test_windows_of_a_file_are_answered_with_their_times(
    runs: Path, trained: TrainedNetwork, recordings: EventSplit, served: Any, tmp_path: Path
) -> None:
    recording = recordings.recording(5)
    events = recording.events()
    table = np.zeros(len(events), [("t", "i8"), ("x", "u2"), ("y", "u2"), ("p", "u1")])
    for name in "txyp":
        table[name] = getattr(events, name) + (7_000_000 if name == "t" else 0)
    np.save(tmp_path / "one.npy", table)
    first = int(events.t[0])
    answers = predict_recordings(trained, [tmp_path / "one.npy"], window="40ms", out=tmp_path / "out.png").answers
    starts = [first + k * 40_000 for k in range(3)]
    assert [answer["start_us"] - 7_000_000 for answer in answers] == starts
    assert [answer["end_us"] - answer["start_us"] for answer in answers] == [40_000] * 3
    assert sum(answer["events"] for answer in answers) == len(events)
    assert (tmp_path / "out.png").stat().st_size > 5000
    _, found = ask(served, [request(recording, start, 40_000) for start in starts])
    for answer, one in zip(answers, found["predictions"], strict=True):
        assert one == pytest.approx(probabilities(answer), abs=1e-6)
    words = ["predict", "moving", str(tmp_path / "one.npy"), "--window", "40ms", "--runs-dir", str(runs)]
    shown = CliRunner().invoke(app, [*words, "--json"])
    assert [json.loads(line) for line in shown.stdout.splitlines()] == answers
    plain = CliRunner().invoke(app, words).stdout
    assert len(plain.splitlines()) == 3
    assert f"{(7_000_000 + first) / 1000:,.6g} to" in plain


def test_windows_of_a_store_have_the_clock_of_their_recording(trained: TrainedNetwork, tmp_path: Path) -> None:
    late = EventArrays(
        np.array([9_000_000, 9_010_000]), np.array([1, 2], np.uint16), np.array([3, 4], np.uint16),
        np.array([0, 1], np.uint8),
    )  # fmt: skip
    with EventStoreWriter(
        tmp_path / "late", source="saccades", class_names=list("abcd"), events=EventFormat.of(SENSOR), options={}
    ) as writer:
        for split in ("train", "test"):
            chunks = [SourceRecording([late], label, duration=50_000) for label in range(4)]
            writer.write_recordings(split, chunks)
        writer.commit()
    answers = predict_recordings(trained, [tmp_path / "late"], window="20ms").answers
    assert [(one["start_us"], one["end_us"], one["events"]) for one in answers[:3]] == [
        (9_000_000, 9_020_000, 2), (9_020_000, 9_040_000, 0), (9_040_000, 9_060_000, 0)
    ]  # fmt: skip
    assert predict_recordings(trained, [tmp_path / "late"]).answers[0]["start_us"] == 9_000_000


def test_what_cannot_be_predicted_is_refused(desk: Path, trained: TrainedNetwork, tmp_path: Path) -> None:
    other = labelled_store(tmp_path / "other", "saccades", (12, 20), [50] * 8, classes=4)
    done = predict_recordings(trained, [Path(other.location)])
    assert not done.answers
    assert "a sensor of 12 x 20, but the network was trained on 12 x 16" in done.bad[0][1]
    (tmp_path / "bad.csv").write_text("t,x,y,p\n1,99,0,1\n")
    assert "outside the sensor 12x16" in predict_recordings(trained, [tmp_path / "bad.csv"]).bad[0][1]
    np.save(tmp_path / "still.npy", np.zeros(0, [("t", "i8"), ("x", "u2"), ("y", "u2"), ("p", "u1")]))
    assert (
        "has no event, so there is nothing to answer" in predict_recordings(trained, [tmp_path / "still.npy"]).bad[0][1]
    )
    for path, window, said in (
        (tmp_path / "none.dat", None, "does not exist"),
        (desk / "store", "40", "--window '40' is no duration"),
        (desk, None, "has no recordings"),
    ):
        with pytest.raises(UserError, match=said):
            predict_recordings(trained, [path], window=window)
    turned = labelled_store(tmp_path / "turned", "saccades", SENSOR, [50] * 8, classes=4, orientation="aedat4")
    with pytest.raises(UserError, match=r"were read as aedat4, but moving was trained on events read as as-read"):
        evaluate_on_split(trained, "test", desk / "stores", Console(file=StringIO()), data=turned.location)


CORNERS = {"t": [0, 5], "x": [0, 15], "y": [0, 11], "p": [1, 0]}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([{**CORNERS, "x": [0, 16]}], "window 0: x is 0 to 16, expected 0 to 15"),
        ([{**CORNERS, "y": [-1, 0]}], "window 0: y is -1 to 0, expected 0 to 11"),
        ([{**CORNERS, "p": [1, 2]}], "window 0: p is 1 to 2, expected 0 to 1"),
        ([{**CORNERS, "t": [5, 0]}], "window 0: t falls or is negative"),
        ([{**CORNERS, "t": [0.5, 1.0]}], "window 0: t is no list of integers"),
        ([{**CORNERS, "t": [1]}], "window 0: t, x, y and p have 1, 2, 2 and 2 values"),
        ([{**CORNERS, "duration": 5}], "window 0: duration is 5 us, expected more than the last t, 5"),
        ([{**CORNERS, "t": [0, 1_700_000_000_000_000]}], "window 0: the last t is .* expected less than an hour"),
        ([{**CORNERS, "duration": 10**30}], "window 0: duration is 1000.* at most an hour"),
        ([{**CORNERS, "width": 20}], "window 0: sensor is 12 x 20, but the network was trained on 12 x 16"),
        ([{**CORNERS, "width": True}], "window 0: width is True, expected an integer"),
        ([CORNERS, {"t": [], "x": [], "y": []}], "window 1: field 'p' is missing"),
        ([{**CORNERS, "z": []}], "window 0: unknown field 'z'"),
        (np.zeros((1, 3, 2, 12, 15)).tolist(), r"expected \[T, C, H, W\] = \[3, 2, 12, 16\]"),
        (np.zeros((1, 2, 2, 12, 16)).tolist(), r"frames have shape \[2, 2, 12, 16\]"),
        (np.full((1, 3, 2, 12, 16), 1e300).tolist(), "expected finite numbers of 32 bits"),
        (np.zeros((1, 12, 16)).tolist(), r"found float64 of shape \[12, 16\]"),
        ([], "found no window"),
    ],
)
def test_what_would_be_misread_is_refused(served: Any, inputs: Any, said: str) -> None:
    status, answer = ask(served, inputs)
    assert status == 400, answer
    assert re.search(said, answer), answer
    assert "a list of windows" in answer


def test_an_empty_window_and_the_example_are_answered(served: Any) -> None:
    status, answer = ask(served, [{"t": [], "x": [], "y": [], "p": [], "duration": 1000}, CORNERS])
    assert status == 200, answer
    assert [sum(one.values()) for one in answer["predictions"]] == [pytest.approx(1)] * 2
    assert served.metadata.metadata["sensor"] == [12, 16]
