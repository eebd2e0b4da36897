"""Files of recordings are read for prediction as those of the training were, and never turned round unnoticed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from spikefleet.api import Model
from spikefleet.cli import app
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.inference import trained_network
from spikefleet.inference.event_prediction import predict_recordings
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.registry.served_network import ServedNetwork
from spikefleet_models.families import build_model
from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.recorded import options_of_files
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store
from support.event_arrays import random_events
from support.event_files import write_aedat2
from support.event_stores import LENGTH, boxed_store, labelled_store

SENSOR = (12, 16)
OF_EVENTS = [("t", "f8"), ("x", "u2"), ("y", "u2"), ("p", "u1")]


def network_of(data: DataSummary, *overrides: str) -> TrainedNetwork:
    torch.manual_seed(0)
    given = ["model.timesteps=2", "model.channels=[4,4]", "data.transform.representation.size=null", *overrides]
    config = load_config("saccades_small", parse_overrides(given))
    network = build_model(config.model).eval()
    for weight in (one for one in network.parameters() if one.ndim == 4):
        weight.data *= 20  # so that few events make spikes
    return TrainedNetwork("mine", network, config, data)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return labelled_store(tmp_path_factory.mktemp("s") / "store", "saccades", SENSOR, [60] * 10, classes=10)


@pytest.fixture(scope="module")
def trained(store: Store) -> TrainedNetwork:
    return network_of(DataSummary.of(store.manifest))


def write_table(path: Path, us: int, up: bool = False) -> Path:
    """A recording of 100 ms whose times have a unit of so many us."""
    events = random_events(300, SENSOR, 100_000, seed=3)
    table = np.zeros(len(events), OF_EVENTS)
    table["t"], table["x"], table["p"] = events.t / us, events.x, events.p
    table["y"] = SENSOR[0] - 1 - events.y if up else events.y
    np.save(path, table)
    return path


def test_a_data_set_knows_how_its_files_were_read(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in "ab":
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            write_table(folder / "one.npy", 1000)
    made = prepare("event_folder", tmp_path / "data", tmp_path / "store", sensor="12x16", time="ms")
    summary = DataSummary.of(made.manifest)
    assert summary.reading == {"time": "ms"}
    summary.write(tmp_path)
    assert DataSummary.read(tmp_path) == summary
    plain = prepare("event_folder", tmp_path / "data", tmp_path / "plain", sensor="12x16")
    assert DataSummary.of(plain.manifest).reading == {}
    DataSummary.of(plain.manifest).write(tmp_path)
    assert "reading" not in (tmp_path / "data.json").read_text()
    assert options_of_files("asl_dvs", {"test": 0.2, "seed": 0}) == {"y_axis": "up"}
    assert options_of_files("event_folder", {"columns": "x,y,t,p", "y_axis": "up", "outside": "drop"}) == {
        "columns": "x,y,t,p",
        "y_axis": "up",
    }


def test_files_are_read_as_those_of_the_training(trained: TrainedNetwork, tmp_path: Path) -> None:
    us, ms = write_table(tmp_path / "us.npy", 1), write_table(tmp_path / "ms.npy", 1000)
    expected = [{**one, "recording": ""} for one in predict_recordings(trained, [us], window="25ms").answers]
    assert len(expected) == 4
    of_ms = dataclasses.replace(trained, data=dataclasses.replace(trained.data, reading={"time": "ms"}))
    for network, options in ((of_ms, None), (trained, {"time": "ms"})):
        found = predict_recordings(network, [ms], window="25ms", options=options).answers
        assert [{**one, "recording": ""} for one in found] == expected
    assert len(predict_recordings(trained, [ms], window="25ms").answers) == 1  # 100 us
    assert len(predict_recordings(of_ms, [us], window="25ms", options={"time": "us"}).answers) == 4
    up = write_table(tmp_path / "up.npy", 1, up=True)
    from_below = dataclasses.replace(trained, data=dataclasses.replace(trained.data, reading={"y_axis": "up"}))
    turned = [{**one, "recording": ""} for one in predict_recordings(from_below, [up], window="25ms").answers]
    assert turned == expected
    assert [{**one, "recording": ""} for one in predict_recordings(trained, [up], window="25ms").answers] != expected
    with pytest.raises(SourceError, match="option 'unit' is unknown"):
        predict_recordings(trained, [us], options={"unit": "ms"})


def test_from_python(trained: TrainedNetwork, tmp_path: Path) -> None:
    model = Model("mine", trained, {}, None)
    ms = write_table(tmp_path / "ms.npy", 1000)
    found = model.predict_recordings(ms, window="25ms", options={"time": "ms"})
    assert found == predict_recordings(trained, [ms], window="25ms", options={"time": "ms"}).answers
    assert model.predict_recordings([str(ms)]) != found
    with pytest.raises(UserError, match="mine is a network of events, not of images; call predict_recordings"):
        model.predict(["one.png"])
    (tmp_path / "bad.csv").write_text("t,x,y,p\n1,99,0,1\n")
    with pytest.raises(UserError, match=r"bad\.csv cannot be read: .*outside the sensor 12x16"):
        model.predict_recordings([ms, tmp_path / "bad.csv"])


def test_the_other_release_is_refused(trained: TrainedNetwork, store: Store, tmp_path: Path) -> None:
    turned = labelled_store(tmp_path / "turned", "saccades", SENSOR, [60] * 10, classes=10, orientation="aedat4")
    done = predict_recordings(trained, [Path(turned.location), Path(store.location)])
    assert "are read as aedat4, but mine was trained on events read as as-read" in done.bad[0][1]
    assert len(done.answers) == 10
    write_aedat2(tmp_path / "one.aedat", random_events(50, (128, 128), 1000, seed=1))
    for orientation, refused in (("aedat4", True), ("aedat2-spikingjelly", False), ("as-read", False)):
        data = dataclasses.replace(trained.data, sensor=(128, 128), orientation=orientation)
        found = predict_recordings(network_of(data), [tmp_path / "one.aedat"])
        assert len(found.bad) == refused, found.bad
        assert not refused or "are read as aedat2-spikingjelly, but mine" in found.bad[0][1]


def test_the_command_hands_options_on_and_says_that_membranes_are_not_carried(
    trained: TrainedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ms = write_table(tmp_path / "ms.npy", 1000)
    networks = {"plain": trained, "stream": network_of(trained.data, "data.transform.window=25ms", "train.stream={}")}
    monkeypatch.setattr(trained_network, "open_trained_network", lambda name, runs_dir: networks[name])

    def run(*words: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, ["predict", *words])
        return done.exit_code, done.stdout, done.stderr

    read = ["--window", "25ms", "--option", "time=ms"]
    code, out, err = run("plain", str(ms), *read)
    assert (code, len(out.splitlines())) == (0, 4), (out, err)
    assert "membranes" not in err
    assert "--stream carries them" in run("stream", str(ms), *read)[2]
    assert "--stream carries them" not in run("stream", str(ms), *read, "--stream")[2]
    for words in (["--batch", "8"], ["--overlap", "0.5"]):
        code, _, err = run("plain", str(ms), *read, *words)
        assert (code, f"{words[0]} is for images" in err) == (2, True), err
    for option, said in (("time", "--option 'time' is not of the form key=value"), ("time=h", "time=h is not allowed")):
        code, _, err = run("plain", str(ms), "--option", option)
        assert (code, said in " ".join(err.split())) == (2, True), err


def test_a_served_detector_answers_as_the_command(tmp_path: Path) -> None:
    sensor = (56, 60)
    store = boxed_store(tmp_path / "store", "saccade_scenes", sensor, 1)
    overrides = {"model.num_classes": 2, "model.timesteps": 2, "model.neuron.input_scale": 8.0}
    config = load_config("saccade_scenes_spike_yolo", overrides | {"model.criterion.score_threshold": 0.0})
    torch.manual_seed(0)
    detector = TrainedNetwork("boxes", build_model(config.model).eval(), config, DataSummary.of(store.manifest))
    (answer,) = predict_recordings(detector, [Path(store.location)], window="100ms", score=0.0).answers
    assert answer["objects"]
    served = ServedNetwork(detector.network, config.transform, detector.task, 2, None, sensor)
    events = store.recordings("test").recording(0).window(0, LENGTH).events()
    request = {name: getattr(events, name).tolist() for name in "txyp"} | {"duration": LENGTH}
    assert served.answer([request]) == [answer["objects"]]
    turned = request | {"x": [sensor[1] - 1 - x for x in request["x"]]}
    assert served.answer([turned]) != [answer["objects"]]
