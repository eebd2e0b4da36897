"""What a killed registration leaves behind is found and removed; nothing that is named, young or in use is."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.registry.api import load, promote
from spikefleet.registry.leftovers import Leftovers, find_leftovers, remove_leftovers
from support.forked import Forked
from support.registered import Trained


def register_and_die(first: Trained) -> None:
    """Registers, and is killed between the upload and the version."""
    MlflowClient.create_model_version = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    first.register("gc_killed")


@pytest.fixture(scope="module")
def crashed(first: Trained, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Id of the logged model of a registration that was killed."""
    before = {one.model_id for one in found(first).found}
    process = Forked(tmp_path_factory.mktemp("crashed") / "output", register_and_die, first)
    process.wait(60)
    assert process.returncode == -signal.SIGKILL, process.said
    (left,) = {one.model_id for one in found(first).found} - before
    return left


def found(first: Trained, least_age_s: float = 0.0) -> Leftovers:
    return find_leftovers(least_age_s=least_age_s, tracking_uri=first.uri)


def test_what_is_named_young_running_or_anothers_stays(first: Trained, crashed: str, tmp_path: Path) -> None:
    client = MlflowClient(first.uri, registry_uri=first.uri)
    kept = first.again(1, tmp_path).register("gc_kept")
    promote("gc_kept", kept.version, "val/top1", tracking_uri=first.uri)
    experiment = client.get_run(first.run_id).info.experiment_id
    others = client.create_logged_model(experiment, name="others", model_type="sklearn")
    client.finalize_logged_model(others.model_id, "READY")
    unfinished = client.create_logged_model(experiment, name="unfinished", model_type="spikefleet")
    running = client.create_run(experiment)
    in_use = client.create_logged_model(
        experiment, name="in-use", source_run_id=running.info.run_id, model_type="spikefleet"
    )
    client.finalize_logged_model(in_use.model_id, "READY")

    now = found(first)
    ids = {one.model_id for one in now.found}
    assert crashed in ids
    assert not ids & {others.model_id, unfinished.model_id, in_use.model_id}
    named = client.search_model_versions("name = 'gc_kept'")
    assert not any(model_id in named[0].source for model_id in ids)
    reasons = " ".join(now.kept)
    assert f"{unfinished.model_id} (unfinished" in reasons
    assert "its upload did not finish (status PENDING)" in reasons
    assert f"its run {running.info.run_id} is running" in reasons
    assert others.model_id not in reasons
    young = find_leftovers(tracking_uri=first.uri)
    assert young.found == ()
    assert any(crashed in reason and "younger than 24 hours" in reason for reason in young.kept)
    client.set_terminated(running.info.run_id)
    assert {crashed, in_use.model_id} <= {one.model_id for one in found(first).found}
    client.delete_logged_model(in_use.model_id)


def test_a_location_that_is_not_its_own_is_left_alone(
    first: Trained, crashed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlflow.entities import LoggedModel

    monkeypatch.setattr(LoggedModel, "artifact_location", property(lambda _: tmp_path.as_uri()))
    now = found(first)
    assert now.found == ()
    assert any("which is not a directory of its own" in reason for reason in now.kept)


def test_a_leftover_that_got_a_version_meanwhile_stays(first: Trained, crashed: str) -> None:
    client = MlflowClient(first.uri, registry_uri=first.uri)
    seen = [one for one in found(first).found if one.model_id == crashed]
    assert seen
    model = client.get_logged_model(crashed)
    client.create_registered_model("gc_late")
    client.create_model_version("gc_late", model.artifact_location, run_id=first.run_id, model_id=crashed)
    assert list(remove_leftovers(seen, tracking_uri=first.uri)) == []
    client.delete_registered_model("gc_late")
    assert crashed in {one.model_id for one in found(first).found}


def test_the_command_lists_and_removes_it_with_its_files(
    first: Trained, crashed: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = ["registry", "gc", "--runs-dir", str(runs)]
    client = MlflowClient(first.uri, registry_uri=first.uri)
    files = Path(client.get_logged_model(crashed).artifact_location.removeprefix("file://"))
    young = CliRunner(env={"COLUMNS": "300"}).invoke(app, words)
    assert young.exit_code == 0
    assert "0 networks without a version removed: 0.0 MB" in young.output
    assert files.is_dir()

    a_day_later = client.get_logged_model(crashed).creation_timestamp / 1000 + 24 * 3600 + 1
    monkeypatch.setattr("spikefleet.registry.leftovers.time.time", lambda: a_day_later)
    dry = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*words, "--dry-run"])
    size = sum(path.stat().st_size for path in files.rglob("*") if path.is_file())
    assert f"would remove {crashed} (gc_killed, " in dry.output
    assert " without a version would be removed: " in dry.output
    assert files.is_dir()
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    plain = json.loads(done.stdout)
    sizes = {one["model_id"]: one["size"] for one in plain["models"]}
    assert sizes[crashed] == size > 100_000
    assert plain["bytes"] == sum(sizes.values())
    assert not files.exists()
    assert found(first).found == ()
    assert load("models:/gc_kept@champion", tracking_uri=first.uri) is not None
