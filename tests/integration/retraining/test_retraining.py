"""Retraining end to end on digits: promoted, kept, nothing new, skipped, killed at each step, failed, rolled back."""

from __future__ import annotations

import json
import shutil
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from spikefleet import registry
from spikefleet.errors import RunError, UserError
from spikefleet.registry import lease as leases
from spikefleet.registry.lease import lease, lease_key
from spikefleet.retraining import retrain as steps
from spikefleet.retraining.plan import Request
from spikefleet.retraining.record import Retrainings
from spikefleet.retraining.retrain import Retrained, retrain
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.splitting import take_split
from support.commands import give, run_commands
from support.retrained import MODEL, Desk, record_of

pytestmark = pytest.mark.xdist_group("retraining")


def test_nothing_is_done_where_nothing_changed(desk: Desk) -> None:
    outcome = desk.retrain()
    assert outcome == Retrained("nothing new", "data, configuration and code are those of version 1")
    assert not list((desk.options.runs_dir / "retrainings").glob("*/retrain.json"))


def test_a_better_network_is_promoted_with_its_reasons_and_a_report(better: tuple[Desk, Retrained]) -> None:
    desk, outcome = better
    assert outcome.word == "promoted", outcome.reason
    assert outcome.reason.startswith("version 2 is better (top-1 ")
    assert desk.aliases() == {"champion": 2}
    champion = registry.show(MODEL, tracking_uri=desk.uri).pick(2)
    assert champion.tags["retraining"] == outcome.id
    assert champion.tags["promoted_because"] == outcome.reason
    assert champion.tags["previous_champion"] == "1"
    history = registry.read_history(MODEL, tracking_uri=desk.uri)
    assert [(change.alias, change.after, change.retraining) for change in history.changes] == [
        ("champion", 1, None),
        ("challenger", 2, None),
        ("champion", 2, outcome.id),
        ("challenger", None, outcome.id),
    ]
    assert outcome.report is not None
    text, folder = outcome.report.read_text(), outcome.report.parent
    for part in (
        "**promoted**: version 2 is better",
        "the configuration changed: train.epochs: expected 2, found 8",
        "| better | yes |",
        f"spikefleet registry rollback {MODEL} --why TEXT",
        "Confusion of the champion",
        "only_candidate_right.png",
    ):
        assert part in text
    gates = json.loads((folder / "gates.json").read_text())
    assert gates["passed"]
    assert [gate["name"] for gate in gates["gates"]] == [
        "proof and flaws",
        "content hash",
        "better",
        "classes",
        "energy",
    ]
    for name in ("candidate/confusion.png", "champion/evaluation.json", "only_candidate_right.png"):
        assert (folder / name).is_file()


def test_the_retraining_is_a_run_in_mlflow_and_the_parent_of_its_training(better: tuple[Desk, Retrained]) -> None:
    desk, outcome = better
    client = MlflowClient(desk.uri)
    experiment = client.get_experiment_by_name("digits")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    own = runs[outcome.id]
    assert own.data.tags["kind"] == "retraining"
    assert own.data.tags["outcome"] == "promoted"
    assert own.info.status == "FINISHED"
    training = runs[record_of(desk, outcome).runs[0]]
    assert training.data.tags["mlflow.parentRunId"] == own.info.run_id
    files = {entry.path for entry in client.list_artifacts(own.info.run_id, "report")}
    assert {"report/report.md", "report/gates.json", "report/candidate", "report/champion"} <= files


def test_the_same_again_is_nothing_new_and_a_network_that_is_not_better_is_kept_back(
    better: tuple[Desk, Retrained], tmp_path: Path
) -> None:
    desk = better[0].copy(tmp_path / "desk")
    assert desk.retrain().word == "nothing new"
    outcome = desk.retrain(train__epochs=3)
    assert outcome.word == "kept", outcome.reason
    assert outcome.reason.startswith("version 3 is not better")
    assert desk.aliases() == {"champion": 2, "challenger": 3}
    again = desk.retrain(train__epochs=3)
    assert again.word == "nothing new"
    assert again.reason.startswith(f"the same was retrained before: {outcome.id} kept: version 3 ")
    forced = desk.retrain(force=True, train__epochs=3)  # its training is there already, so only the gates run
    assert forced.word == "kept"
    assert forced.id == f"{outcome.id}-2"
    model = MlflowClient(desk.uri, registry_uri=desk.uri).get_registered_model(MODEL)
    assert json.loads(model.tags["spikefleet.gate_comparisons"])["count"] == 3


def test_a_training_with_a_wrong_gate_store_does_not_begin(desk: Desk) -> None:
    with pytest.raises((UserError, ValueError), match="is not a store"):
        desk.train("second", **{"retrain.gate_store": "nowhere"})
    assert not (desk.options.runs_dir / "second").exists()


def test_a_retraining_that_fails_leaves_all_aliases_alone_and_can_be_repeated(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RunError("the disk burns")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "run_training", fail)
        with pytest.raises(RunError, match=r"retraining .* failed, and no alias was changed: the disk burns"):
            desk.retrain(train__epochs=8)
    assert desk.aliases() == {"champion": 1}
    (folder,) = Retrainings(desk.options.runs_dir).of(MODEL)
    record = folder.read()
    assert record is not None
    assert (record.word, record.reason) == ("failed", "the disk burns")
    client = MlflowClient(desk.uri)
    experiment = client.get_experiment_by_name("digits")
    (run,) = client.search_runs([experiment.experiment_id], "tags.kind = 'retraining'")
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"] == "the disk burns"
    with monkeypatch.context() as patch:  # the same command resumes it
        patch.setattr(steps._Retraining, "_train", lambda self, parent: self._note(runs=["first"], candidate=1))
        assert desk.retrain(train__epochs=8).id == folder.id


def test_of_two_at_once_one_runs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with Retrainings(desk.options.runs_dir).lock(MODEL):
        outcome = desk.retrain(train__epochs=8)
        assert outcome.word == "skipped"
        assert outcome.reason.startswith(f"model {MODEL} is being retrained (process ")
    client = MlflowClient(desk.uri, registry_uri=desk.uri)
    with lease(client, MODEL, "retraining", "a retraining elsewhere"):  # on another host, without this file system
        outcome = desk.retrain(train__epochs=8)
        assert outcome.word == "skipped"
        assert outcome.reason.startswith(f"model {MODEL} is being retrained: a retraining elsewhere (process ")
    dead = {"id": "x", "label": "y", "host": "z", "process": 1, "place": "", "since": 0.0, "expires": time.time() - 900}
    client.create_registered_model(lease_key(MODEL, "retraining"), tags={leases._TAG: json.dumps(dead)})
    assert desk.retrain().word == "nothing new"  # the lease of a dead host was taken over
    assert desk.aliases() == {"champion": 1}


def test_without_a_gate_store_the_candidate_is_challenger_and_the_command_is_named(desk: Desk) -> None:
    outcome = desk.retrain(train__epochs=3, retrain__gate_store=None)
    assert outcome.word == "kept"
    assert outcome.reason.startswith("there is no gate store, so version 2 is challenger and nothing is promoted:")
    assert "`spikefleet data split STORE --gate 0.1 --seed 0`" in outcome.reason
    assert desk.aliases() == {"champion": 1, "challenger": 2}
    with_gates = desk.retrain(train__epochs=3)  # the training is there, so only the gates run now
    assert with_gates.candidate == 2
    assert with_gates.word in ("promoted", "kept")
    assert record_of(desk, with_gates).verdict is not None


def test_new_data_are_a_reason_and_their_drift_is_reported(desk: Desk) -> None:
    grown = Store.open(desk.root / "stores" / "split")
    take_split(grown, desk.root / "stores" / "less", "spare", 0.4, seed=3)
    outcome = desk.retrain(data="less")
    assert outcome.report is not None
    text = outcome.report.read_text()
    assert "the data changed: content hash" in text
    assert "## New data against the champion's" in text
    drift = json.loads((outcome.report.parent / "drift.json").read_text())
    assert drift["after"]["images"] < drift["before"]["images"]
    assert (outcome.report.parent / "drift.png").is_file()


@pytest.mark.slow
def test_several_seeds_are_trained_and_the_best_is_judged(desk: Desk) -> None:
    outcome = desk.retrain(retrain__seeds=2, train__epochs=1)
    record = record_of(desk, outcome)
    assert [name.rpartition("-")[2] for name in record.runs] == ["s0", "s1"]
    scores = [score for score in record.scores if score is not None]
    assert len(scores) == 2
    version = registry.show(MODEL, tracking_uri=desk.uri).pick(2)
    assert version.metrics["val/top1"] == max(scores)
    assert len(registry.show(MODEL, tracking_uri=desk.uri).versions) == 2
    assert outcome.report is not None
    assert "| validation over 2 seeds |" in outcome.report.read_text()


@pytest.mark.slow
def test_a_retraining_can_start_from_the_champions_weights(desk: Desk) -> None:
    outcome = desk.retrain(start="champion", train__epochs=1, optim__lr=0.001, force=True)
    record = record_of(desk, outcome)
    version = registry.show(MODEL, tracking_uri=desk.uri).pick(2)
    champion = registry.show(MODEL, tracking_uri=desk.uri).pick(1)
    assert version.metrics["val/top1"] > champion.metrics["val/top1"] - 0.1, "after one epoch it would be at chance"
    run = desk.options.runs_dir / record.runs[0]
    assert (run / "initial.safetensors").is_file()
    (run / "initial.safetensors").write_bytes(b"other")
    shutil.rmtree(run / "checkpoints")
    (run / "run.json").unlink()
    with pytest.raises(RunError, match=r"train\.initial_weights"):
        desk.retrain(start="champion", train__epochs=1, optim__lr=0.001, force=True)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"retrain.gate_store": "nowhere"}, "is not a store"),
        ({"retrain.gate_split": "train"}, "of its .* different images are also in the split"),
        ({"retrain.gate_split": "gates"}, r"has no split 'gates'; expected one of"),
    ],
)
def test_a_gate_store_that_cannot_judge_is_refused(desk: Desk, changes: dict[str, Any], error: str) -> None:
    if "retrain.gate_split" in changes and changes["retrain.gate_split"] == "train":
        changes = {**changes, "retrain.gate_store": "digits"}
    with pytest.raises((UserError, RunError, ValueError), match=error):
        retrain(Request(MODEL, {"train.epochs": 1, **changes}), desk.options, Console(file=StringIO()))
    assert desk.aliases()["champion"] == 1


def test_an_unknown_model_is_named_before_anything_is_locked(desk: Desk) -> None:
    with pytest.raises(UserError, match="registered model 'sg_resnet_digit' does not exist; did you mean"):
        retrain(Request("sg_resnet_digit"), desk.options, Console(file=StringIO()))
    assert not (desk.options.runs_dir / "retrainings").exists()


def test_the_command_says_what_it_would_do_and_refuses_what_has_no_effect(desk: Desk) -> None:
    where = ("--runs-dir", str(desk.options.runs_dir), "--stores-dir", str(desk.options.stores_dir))
    said = run_commands(
        desk.root,
        [
            give("retrain", MODEL, "--dry-run", *where),
            give("retrain", MODEL, "--dry-run", "train.epochs=5", *where),
            give("retrain", MODEL, "train.epochs=5", "--dry-run", "--json", "--schedule", "0 3 * * 1", *where),
            give("retrain", MODEL, *where),
            give("retrain", MODEL, "--timezone", "Europe/Berlin", *where, code=2),
            give("retrain", MODEL, "--schedule", "0 3 * *", *where, code=2),
            give("retrain", MODEL, "--schedule", "0 3 * * 1", "--timezone", "Europe/Berlinn", *where, code=2),
            give("registry", "history", MODEL, *where[:2]),
            give("registry", "rollback", MODEL, "--why", "x", *where[:2], code=2),
        ],
    )
    assert "nothing new: data, configuration and code are those of models:/sg_resnet_digits/1" in said[0]
    assert "because the configuration changed: train.epochs: expected 2, found 5" in said[1]
    assert "would compare it with the champion on split" in said[1]
    plan = json.loads(said[2][said[2].index("{") :])
    assert (plan["champion"], plan["gate_store"], plan["seeds"]) == (1, "split", 1)
    assert plan["next"].endswith("03:00:00+00:00")
    assert said[3].splitlines()[-1] == "nothing new: data, configuration and code are those of version 1"
    assert "--timezone=Europe/Berlin has no effect without --schedule" in said[4]
    assert "--schedule" in said[5]
    assert "Europe/Berlin" in said[6]
    assert "version 1 is the first champion" in said[7]
    assert "replaced no champion that is known; name the version with --to" in said[8]
