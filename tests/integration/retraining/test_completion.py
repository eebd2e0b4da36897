"""Retrainings that were killed, failed, or overtaken: what the same command does then."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from spikefleet import registry
from spikefleet.errors import RunError
from spikefleet.registry import aliases as alias_changes
from spikefleet.registry.history import append_change
from spikefleet.registry.lease import lease_key
from spikefleet.retraining import retrain as steps
from spikefleet.retraining.record import Record, RetrainingFolder, Retrainings
from spikefleet.retraining.retrain import Retrained
from spikefleet.runs.train_run import run_training
from support.retrained import MODEL, Desk

pytestmark = pytest.mark.xdist_group("retraining")


class KilledError(KeyboardInterrupt):
    """Ends the retraining between two steps."""


def test_killed_after_each_step_it_resumes_and_ends_the_same(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt ends at its next record."""
    written: list[set[str]] = []
    real = RetrainingFolder.write

    def write_and_die(self: RetrainingFolder, record: Record) -> Record:
        done = real(self, record)
        state = {name for name, value in record.model_dump().items() if value not in (None, [], "")}
        if state not in written:
            written.append(state)
            raise KilledError
        return done

    trainings: list[str] = []
    train = run_training

    def counted_training(config: Any, options: Any, console: Any, name: str) -> Any:
        trainings.append(name)
        return train(config, options, console, name)

    monkeypatch.setattr(RetrainingFolder, "write", write_and_die)
    monkeypatch.setattr(steps, "run_training", counted_training)
    deaths = 0
    while True:
        try:
            outcome = desk.retrain(train__epochs=4)
            break
        except KilledError:
            deaths += 1
            assert deaths < 10
    steps_recorded = [sorted(after - before) for before, after in pairwise(written)]
    assert steps_recorded == [["runs", "scores"], ["candidate"], ["verdict"], ["reason", "word"]]
    assert deaths == 5
    assert len(trainings) == 1
    assert desk.aliases() == ({"champion": 2} if outcome.word == "promoted" else {"champion": 1, "challenger": 2})
    assert len(list((desk.options.runs_dir / "retrainings").glob("*/retrain.json"))) == 1
    assert len(registry.show(MODEL, tracking_uri=desk.uri).versions) == 2
    assert not [one.name for one in MlflowClient(desk.uri).search_registered_models() if "lease" in one.name]


@pytest.fixture
def undecided(better: tuple[Desk, Retrained], tmp_path: Path) -> Desk:
    """The better network is registered, and nothing else of its retraining is there."""
    desk = better[0].copy(tmp_path / "undecided")
    shutil.rmtree(desk.options.runs_dir / "retrainings")
    client = MlflowClient(desk.uri, registry_uri=desk.uri)
    client.set_registered_model_alias(MODEL, "champion", "1")
    client.set_registered_model_alias(MODEL, "challenger", "2")
    return desk


def ended_run(desk: Desk, outcome: Retrained) -> Any:
    client = MlflowClient(desk.uri)
    experiment = client.get_experiment_by_name("digits")
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'retraining'")
    return next(run for run in runs if run.info.run_name == outcome.id and "outcome" in run.data.tags)


def test_killed_right_after_the_alias_was_moved_it_is_completed(
    undecided: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = undecided

    def die(client: Any, history: Any, action: str, *rest: Any) -> Any:
        if action == "promoted":
            raise KilledError
        return append_change(client, history, action, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(alias_changes, "append_change", die)
        with pytest.raises(KilledError):
            desk.retrain(train__epochs=8)
    assert desk.aliases() == {"champion": 2, "challenger": 2}
    outcome = desk.retrain(train__epochs=8)
    assert outcome.word == "promoted"
    assert outcome.reason.startswith("version 2 is better (top-1 ")
    assert outcome.report is not None
    assert "| champion before | version 1 |" in outcome.report.read_text()
    assert desk.aliases() == {"champion": 2}
    last = registry.read_history(MODEL, tracking_uri=desk.uri).changes[-2:]
    assert [(one.action, one.alias, one.after) for one in last] == [
        ("found", "champion", 2),
        ("alias removed", "challenger", None),
    ]
    assert {one.retraining for one in last} == {outcome.id}
    run = ended_run(desk, outcome)
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "promoted")
    assert desk.retrain(train__epochs=8).word == "nothing new"


def test_a_report_that_fails_does_not_undo_the_promotion_and_is_written_by_the_same_command(
    undecided: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RunError("the disk is full")

    desk = undecided
    with monkeypatch.context() as patch:
        patch.setattr(steps, "write_report", fail)
        with pytest.raises(RunError, match="has promoted version 2, but has no report: the disk is full; the same"):
            desk.retrain(train__epochs=8)
    (folder,) = Retrainings(desk.options.runs_dir).of(MODEL)
    record = folder.read()
    assert record is not None
    assert record.word == "promoted"
    outcome = desk.retrain(train__epochs=8)
    assert (outcome.word, outcome.id) == ("promoted", folder.id)
    run = ended_run(desk, outcome)
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags


@pytest.mark.parametrize("meanwhile", ["the lease is lost", "the candidate is rolled back"])
def test_what_happens_while_it_is_trained_and_compared_counts(
    undecided: Desk, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    desk = undecided
    client = MlflowClient(desk.uri, registry_uri=desk.uri)
    train, judged = steps._Retraining._train, steps._Retraining._judged

    def trained(self: Any, parent: str | None) -> None:
        train(self, parent)
        client.delete_registered_model(lease_key(MODEL, "retraining"))

    def barred(self: Any, *given: Any) -> None:
        judged(self, *given)
        client.set_model_version_tag(MODEL, "2", "rolled_back", "reads 7 as 1")

    if meanwhile == "the lease is lost":
        monkeypatch.setattr(steps._Retraining, "_train", trained)
        with pytest.raises(RunError, match=r"and the champion was not changed: the lease .* was lost"):
            desk.retrain(train__epochs=8)
    else:
        monkeypatch.setattr(steps._Retraining, "_judged", barred)
        outcome = desk.retrain(train__epochs=8)
        assert outcome.word == "kept"
        assert outcome.reason.startswith("version 2 was rolled back: reads 7 as 1")
    assert desk.aliases()["champion"] == 1
