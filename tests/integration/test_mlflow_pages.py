"""What MLflow's pages show of a run, in a real database: data set, description, experiment, tables, no empty tag."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from spikefleet.errors import UserError
from spikefleet.tracking.journal import DELIVERED, JOURNAL
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.tracking.mlflow_pages import KIND, NOTE, TABLES, RunListView, experiment_page
from spikefleet.tracking.tracker import TrackedDataset, Tracker, annotate, sync

DIGITS = TrackedDataset("digits", "f438ba1aaf09", '{"uri": "stores/digits"}', "{}", '{"train": 1295}')
VIEW = RunListView("Results", "All results", ("test/top1", "energy_mj"), ("T", "D"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uri(runs: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield resolve_tracking_uri(runs)


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def _open(runs: Path, name: str, uri: str, experiment: str = "pages") -> Tracker:
    return Tracker.open(runs / name, name, experiment, uri)


def _closed(tracker: Tracker) -> str:
    assert tracker.finish("FINISHED", wait_s=30) == 0
    assert tracker.run_id is not None
    return tracker.run_id


def test_the_data_set_is_one_input_though_a_crash_sends_everything_again(
    runs: Path, uri: str, client: MlflowClient
) -> None:
    tracker = _open(runs, "data", uri)
    tracker.log_dataset(DIGITS)
    tracker.log_dataset(DIGITS)
    tracker.set_tags({"failure": "cable pulled"})
    tracker.set_tags({"failure": ""})
    run_id = _closed(tracker)
    assert (runs / "data" / JOURNAL).read_text().count('"dataset"') == 1
    (runs / "data" / DELIVERED).unlink()  # as after a kill between MLflow's answer and its record
    assert sync(runs / "data", uri) > 0
    (found,) = client.get_run(run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("digits", "f438ba1aaf09")
    assert json.loads(found.dataset.profile) == {"train": 1295}
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]
    again = _open(runs, "data", uri)
    again.log_dataset(DIGITS)
    again.log_dataset(TrackedDataset("digits", "0" * 12, "{}", "{}", "{}"))
    assert len(client.get_run(_closed(again)).inputs.dataset_inputs) == 2


def test_an_empty_value_removes_a_tag_and_sets_none(runs: Path, uri: str, client: MlflowClient) -> None:
    tracker = _open(runs, "tags", uri)
    tracker.set_tags({"failure": "", "plugins": "", "recipe": "digits"})
    tracker.set_tags({"failure": "disk full"})
    assert tracker.flush(wait_s=30) == 0
    assert client.get_run(tracker.run_id).data.tags["failure"] == "disk full"
    client.delete_tag(tracker.run_id, "failure")  # by a person, in the meantime
    tracker.set_tags({"failure": "", "restarts": ""})
    tags = client.get_run(_closed(tracker)).data.tags
    assert tags["recipe"] == "digits"
    assert not {"failure", "plugins", "restarts"} & tags.keys()
    resumed = _open(runs, "tags", uri)
    resumed.set_tags({"recipe": ""})
    assert "recipe" not in client.get_run(_closed(resumed)).data.tags


def test_an_experiment_gets_what_it_lacks(runs: Path, uri: str, client: MlflowClient) -> None:
    theirs = client.create_experiment("theirs", tags={KIND: "regression", "spikefleet": "kept"})
    for name, experiment in (("ours", "fresh"), ("guest", "theirs")):
        tracker = _open(runs, name, uri, experiment)
        tracker.describe_experiment(experiment_page("Trainings.", VIEW))
        _closed(tracker)
    fresh = client.get_experiment_by_name("fresh")
    assert fresh is not None
    assert fresh.tags[KIND] == "custom_model_development"
    place = f"#/experiments/{fresh.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW.key}"
    assert fresh.tags[NOTE] == f"Trainings. [All results]({place})"
    held = client.get_experiment(theirs).tags
    assert (held[KIND], held["spikefleet"]) == ("regression", "kept")
    assert f"/experiments/{theirs}/runs" in held[NOTE]
    view = json.loads(held[VIEW.tag[0]])
    assert view["name"] == "Results"
    assert json.loads(view["state"])["selectedColumns"] == [
        "metrics.`test/top1`",
        "metrics.`energy_mj`",
        "params.`T`",
        "params.`D`",
        "attributes.`Dataset`",
        "attributes.`Models`",
    ]
    assert VIEW.tag == VIEW.tag
    assert RunListView("Results", "All results", ("test/top5",)).key != VIEW.key


def test_a_description_is_replaced_unless_a_person_wrote_it(runs: Path, uri: str, client: MlflowClient) -> None:
    tracker = _open(runs, "described", uri)
    tracker.describe("Training.\n\nIt begins")
    assert tracker.flush(wait_s=30) == 0
    assert client.get_run(tracker.run_id).data.tags[NOTE] == "Training.\n\nIt begins"
    tracker.describe("Training.\n\n90%")
    run_id = _closed(tracker)
    assert client.get_run(run_id).data.tags[NOTE] == "Training.\n\n90%"
    annotate(runs / "described", {NOTE: "Training.\n\n90%, registered"})
    assert sync(runs / "described", uri) == 1
    run = client.get_run(run_id)
    assert (run.data.tags[NOTE], run.info.status) == ("Training.\n\n90%, registered", "FINISHED")
    client.set_tag(run_id, NOTE, "Ask Ada about this one")
    annotate(runs / "described", {NOTE: "Training.\n\nanother", "recipe": "digits"})
    assert sync(runs / "described", uri) == 1
    tags = client.get_run(run_id).data.tags
    assert (tags[NOTE], tags["recipe"]) == ("Ask Ada about this one", "digits")


def test_a_table_is_shown_once_and_replaced(runs: Path, uri: str, client: MlflowClient, tmp_path: Path) -> None:
    first = _open(runs, "tables", uri)
    first.show_table([{"layer": "stem", "rate": 0.5}], "layers.json")
    first.show_table([{"layer": "stem", "energy_mj": 1.0}], "layer_energy.json")
    with pytest.raises(UserError, match="needs at least one row"):
        first.show_table([], "none.json")
    _closed(first)
    again = _open(runs, "tables", uri)
    again.show_table([{"layer": "stem", "rate": 0.25}, {"layer": "head"}], "layers.json")
    run_id = _closed(again)
    assert json.loads(client.get_run(run_id).data.tags[TABLES]) == [
        {"path": "layers.json", "type": "table"},
        {"path": "layer_energy.json", "type": "table"},
    ]
    text = Path(client.download_artifacts(run_id, "layers.json", str(tmp_path))).read_text()
    assert json.loads(text) == {"columns": ["layer", "rate"], "data": [["stem", 0.25], ["head", None]]}
