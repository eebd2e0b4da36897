"""`spikefleet tune` as a user meets it: trials tracked under their search, a report, registration, refusals."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.reproduction.recorded_search import recorded_searches
from spikefleet.reproduction.results import read_results
from spikefleet.runs.run_dir import Run
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.journal import SearchFolder
from support.ranks import run_ranks
from support.snapshots import assert_same_end

pytestmark = pytest.mark.xdist_group("ray")

SEARCH = """
recipe: digits
overrides: {train.epochs: 2, train.global_batch: 32, model.width: 0.125, model.stages: [1, 1]}
space:
  model.timesteps: {choice: [1, 2]}
objectives: {val/top1: max, energy_mj: min}
sampler: grid
budget: {trials: 2}
"""


def tune(folder: Path, stores_dir: Path, *words: str) -> str:
    places = ["--runs-dir", str(folder / "runs"), "--stores-dir", str(stores_dir)]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["tune", str(folder / "small.yaml"), *words, *places])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(ray_on_two_cpus: None, stores_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    (folder / "small.yaml").write_text(SEARCH)
    words = ("--register", "best", "--confirm", "1", "--results", str(folder / "results"))
    said = tune(folder, stores_dir, *words, "train.label_smoothing=0.1")
    assert "trial 2/2" in said
    assert "confirmed" in said
    assert "sg_resnet_digits version 1 is champion" in said
    return folder


def test_each_trial_is_a_nested_run_with_its_figures(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("search-small")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"small", "small-0000", "small-0001"}
    parent = runs["small"]
    assert parent.data.metrics["trials"] == 2
    for name in ("small-0000", "small-0001"):
        trial = runs[name]
        assert trial.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert trial.info.status == "FINISHED"
        assert trial.data.metrics["energy_mj"] > 0
        assert trial.data.params["optim.momentum"] == "0.9"  # also what no override says
        assert trial.data.tags.keys() >= {"code_version", "dataset", "recipe", "search", "status", "task", "trial"}
        assert all(trial.data.tags.values()), "a tag is empty"
        assert [data.dataset.name for data in trial.inputs.dataset_inputs] == ["digits"]
        assert "* Status: finished." in trial.data.tags["mlflow.note.content"]
        assert {one.path for one in client.list_artifacts(trial.info.run_id, "report")} >= {"report/energy.json"}
    assert {run.data.params.get("model.timesteps") for run in runs.values()} == {None, "1", "2"}
    assert {run.data.params.get("T") for run in runs.values()} == {None, "1", "2"}
    assert "**Pareto front: " in parent.data.tags["mlflow.note.content"]
    assert "environment.json" in {one.path for one in client.list_artifacts(parent.info.run_id)}
    trials = client.search_runs([experiment.experiment_id], "tags.search = 'small'")  # the filter of the view
    assert {run.info.run_name for run in trials} == {"small-0000", "small-0001"}


def test_the_report_has_front_and_plots(folder: Path) -> None:
    report = folder / "runs" / "searches" / "small" / "report"
    assert {path.name for path in report.iterdir()} >= {"results.json", "results.csv", "front.png", "parallel.png"}
    results = json.loads((report / "results.json").read_text())
    assert results["complete"]
    assert set(results["front"]) <= {"small-0000", "small-0001"}


def test_members_of_the_front_are_trained_with_another_seed(folder: Path) -> None:
    report = folder / "runs" / "searches" / "small" / "report"
    rows = json.loads((report / "confirmation.json").read_text())
    assert [row["trial"] for row in rows] == json.loads((report / "results.json").read_text())["front"]
    for row in rows:
        assert row["seeds"] == 1
        (other,) = row["by_seed"]
        assert other["seed"] == 1
        assert row["val/top1"]["mean"] == other["metrics"]["val/top1"] > 0
    (again,) = (folder / "runs" / "searches").glob("small-confirm-*")
    held = json.loads((again / "search.json").read_text())
    assert held["overrides"]["train.label_smoothing"] == 0.1
    assert {point["train.seed"] for point in held["points"]} == {1}


def test_the_search_is_recorded_for_the_page_of_evidence(folder: Path) -> None:
    (recorded,) = recorded_searches(folder / "results")
    report = folder / "runs" / "searches" / "small" / "report"
    assert [one.name for one in recorded.front] == json.loads((report / "results.json").read_text())["front"]
    assert recorded.registered is not None
    assert recorded.registered["name"] == "sg_resnet_digits"
    assert recorded.registered["trial"] in {one.name for one in recorded.trials}
    assert recorded.dataset == "digits"
    assert all(len(one.others) == 1 for one in recorded.front)
    assert recorded.seconds > 0


def test_other_data_are_refused(folder: Path, stores_dir: Path) -> None:
    store = stores_dir / "other"
    if not store.exists():
        prepare("digits", None, store, seed=7)
    places = ["--runs-dir", str(folder / "runs"), "--stores-dir", str(stores_dir)]
    words = ["tune", str(folder / "small.yaml"), "train.label_smoothing=0.1", f"data.store={store}", *places]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "was started on data with content hash" in " ".join(done.stderr.split())


def test_the_same_command_runs_nothing_again(folder: Path, stores_dir: Path) -> None:
    said = tune(folder, stores_dir, "train.label_smoothing=0.1")
    assert "trial " not in said.partition("on the front")[0].replace("trials are", "")
    assert "report:" in said


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("model.timesteps:", "model.timestep:"), ("model.timestep", "did you mean")),
        (("choice: [1, 2]", "choice: []"), ("model.timesteps", "choice")),
        (("choice: [1, 2]", "choice: [0, 2]"), ("model.timesteps", "0")),
        (("val/top1: max", "val/map50: max"), ("val/map50", "this task reports no")),
        (("val/top1: max", "val/top1: up"), ("val/top1", "up")),
        (("trials: 2", "trials: 0"), ("budget.trials", "0")),
        (("model.timesteps:", "model.neuron.bound:"), ("model.neuron.bound", "does not use")),
        (("sampler: grid", "sampler: gird"), ("sampler", "gird")),
        (("model.timesteps:", "data.seed:"), ("data.seed", "share one store")),
    ],
)
def test_what_could_not_run_is_refused_before_anything_starts(
    change: tuple[str, str], parts: tuple[str, ...], stores_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(SEARCH.replace(*change))
    words = ["tune", str(tmp_path / "bad.yaml"), "--runs-dir", str(tmp_path / "runs"), "--stores-dir", str(stores_dir)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, f"{done.output}\n{done.exception!r}"
    for part in parts:
        assert part in " ".join(done.stderr.split())
    assert not (tmp_path / "runs").exists()


def test_overrides_and_resources_are_laid_over_the_file(stores_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SEARCH)

    def refuse(*words: str) -> str:
        places = ["--runs-dir", str(tmp_path / "runs"), "--stores-dir", str(stores_dir)]
        done = CliRunner().invoke(app, ["tune", str(tmp_path / "small.yaml"), *words, *places])
        assert done.exit_code == 2, f"{done.output}\n{done.exception!r}"
        return " ".join(done.stderr.split())

    assert "is in both space and overrides" in refuse("model.timesteps=4")
    assert "did you mean 'optim.lr'" in refuse("optim.lrr=0.1")
    assert "data.store" in refuse(f"data.store={tmp_path}/none") or "none" in refuse(f"data.store={tmp_path}/none")
    assert "gpus_per_worker=0.5" in refuse("--workers", "2", "--gpus-per-worker", "0.5")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])  # slow: groups of workers
def test_a_signal_stops_trials_with_a_checkpoint(
    workers: int, ray_on_two_cpus: None, stores_dir: Path, tmp_path: Path, no_figures: None
) -> None:
    """The search resumes from there, and ends as one that was never stopped."""
    long = SEARCH.replace("choice: [1, 2]", "choice: [1]").replace("train.epochs: 1", "train.epochs: 6")
    (tmp_path / "small.yaml").write_text(f"{long}resources: {{workers: {workers}}}\n")
    run = Run(tmp_path / "runs/searches/small/trials/small-0000")

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while run.checkpoints.latest() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    places = ["--runs-dir", str(tmp_path / "runs"), "--stores-dir", str(stores_dir)]
    thread = threading.Thread(target=interrupt)
    thread.start()
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["tune", str(tmp_path / "small.yaml"), *places])
    thread.join()
    assert "stopping after this step; again to abort" in done.output
    assert "interrupted; resume with: spikefleet" in done.stderr
    assert done.exit_code == 143
    assert (run.record()["status"], run.record()["signal"]) == ("interrupted", "SIGTERM"), "it committed a checkpoint"
    assert SearchFolder(tmp_path / "runs/searches", "small").read().unfinished == [0]
    tune(tmp_path, stores_dir)
    clean = Run(tmp_path / "clean")
    store = Store.open(stores_dir / "digits", verify=False)
    if workers > 1:
        run_ranks(run.config(), stores_dir / "digits", clean.path)
    else:
        train(run.config(), store, clean.path, ProcessGroup.single(), NullSink())
    assert_same_end(run.path, clean.path)


# ------------------------------------------------------------------------------------------------ reproduce


def reproduce(folder: Path, stores_dir: Path, *words: str, code: int = 0) -> str:
    places = ["--runs-dir", str(folder / "runs"), "--stores-dir", str(stores_dir)]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["reproduce", *words, *places])
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return " ".join((done.stdout if code == 0 else done.stderr).split())


def test_rows_of_a_table_are_trained_once_for_all_tables(
    ray_on_two_cpus: None, stores_dir: Path, tmp_path: Path
) -> None:
    small, results = ("train.epochs=1", "model.width=0.125"), ("--results", str(tmp_path / "results"))
    first = ("sg_resnet_table9", *small, "--only", "SG ResNet10*", "--seeds", "1", *results)
    said = reproduce(tmp_path, stores_dir, *first)
    assert "trial 2/2" in said
    assert "0 of 2 trainings done, in 0 s of training; 2 left, their time is not known yet" in said
    assert "recorded 2 trainings in" in said
    (folder,) = (tmp_path / "runs" / "reproductions").glob("sg_resnet_table9-digits-*")
    assert {path.name for path in folder.iterdir()} >= {"report.md", "report.json", "report.png"}
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["SG ResNet10, BSG", "SG ResNet10, BSG*"]
    for row in rows:
        measured = row["metrics"]["test/top1"]
        assert 0 < measured["mean"] < 100
        assert (row["name"], measured["data"], measured["difference"]) == (f"digits: {row['row']}", "digits", None)
        assert row["paper"]["data"] == "CIFAR-100"
        assert len(row["data_hashes"][0]) == 64
        assert row["code_versions"] not in ([], ["unknown"])
        assert row["seeds"] == [0]
    # The first row of table 7 is that of table 9; the second one, and further seeds, were not run.
    said = reproduce(
        tmp_path, stores_dir, "sg_resnet_table7", *small, "--only", "*ResNet10", "--seeds", "2", "--report-only"
    )
    assert "trial " not in said
    (other,) = folder.parent.glob("sg_resnet_table7-digits-*")
    rows = json.loads((other / "report.json").read_text())["rows"]
    assert rows[0]["trials"] == ["paper-digits-digits_narrow-0000"]
    assert rows[0]["remark"] == "seed 1 was not run"
    assert rows[1]["remark"] == "not run: seed 0 was not run; seed 1 was not run"
    assert rows[1]["metrics"]["test/top1"]["mean"] is None
    # What an earlier form of the recipe has learnt is not this one's.
    config = tmp_path / "runs/searches/paper-digits-digits_narrow/trials/paper-digits-digits_narrow-0000/config.json"
    config.write_text(json.dumps({**(tree := json.loads(config.read_text())), "optim": {**tree["optim"], "lr": 9.0}}))
    said = reproduce(tmp_path, stores_dir, "sg_resnet_table7", *small, "--only", "*ResNet10", "--report-only")
    assert "seed 0 was trained by an earlier form of recipe digits_narrow" in said
    # Without the runs, elsewhere: the record alone says the same, and nothing is trained again.
    (tmp_path / "elsewhere").mkdir()
    said = reproduce(tmp_path / "elsewhere", stores_dir, *first)
    assert "2 of 2 trainings done" in said
    assert "trial " not in said
    assert "recorded" not in said
    (again,) = (tmp_path / "elsewhere" / "runs" / "reproductions").glob("sg_resnet_table9-digits-*")
    assert (again / "report.json").read_text() == (folder / "report.json").read_text()
    assert not (tmp_path / "elsewhere" / "runs" / "searches").exists()
    (file,) = (tmp_path / "results").glob("*.parquet")
    assert file.name == "paper-digits-digits_narrow.parquet"
    assert all(len(one.history) == 1 and one.card is not None for one in read_results(file).values())


def test_tables_that_cannot_be_reproduced_say_why(stores_dir: Path, tmp_path: Path) -> None:
    def refuse(*words: str) -> str:
        return reproduce(tmp_path, stores_dir, *words, code=2)

    assert "did you mean 'sg_resnet_table3'" in refuse("sg_resnet_tabel3")
    assert "matches no row" in refuse("sg_resnet_table3", "--only", "VGG*")
    assert "data prepare gen1 DIR" in refuse("spike_yolo_table4", "--scale", "full", "--gpus-per-worker", "0")
    assert "renamed; use --scale scenes" in refuse("spike_yolo_table4", "--scale", "digits")
    dvs = refuse("sg_resnet_table3", "--scale", "full", "--gpus-per-worker", "0", "--only", "DVS*")
    assert "data prepare dvs_cifar10 DIR" in dvs
    assert "cifar100" in refuse("sg_resnet_table7", "--scale", "full", "--gpus-per-worker", "0")
    assert "train.seed='abc'" in refuse("sg_resnet_table7", "train.seed=abc")
    assert "cannot be divided by 5" in refuse("sg_resnet_table7", "--workers", "5")
    assert "names one data set" in refuse("sg_resnet_table3", "data.root=/data", "--scale", "full")
    assert "optim.lr" in refuse("sg_resnet_table7", "optim.lrr=1")
    assert not (tmp_path / "runs" / "searches").exists()
    # What takes no training is told all the same.
    assert "23.15" in reproduce(tmp_path, stores_dir, "spike_yolo_table5", "--report-only")


# ----------------------------------------------------------------------------------------------- groups of workers

GROUPS = """
recipe: digits
overrides: {train.epochs: 3, model.width: 0.125, model.stages: [1, 1], checkpoint.keep_last: 1}
space:
  optim.lr: {choice: [0.1, 1.0e-7]}
objectives: {val/top1: max, energy_mj: min}
sampler: grid
points: [{optim.lr: 0.1}, {optim.lr: 1.0e-7}]
scheduler: {kind: asha, metric: val/top1, grace_epochs: 2, reduction: 2}
budget: {trials: 2}
resources: {workers: 2, max_concurrent: 1}
"""


# slow: a group more, which a scheduler stops; test_search.py has schedulers that stop trials without groups
@pytest.mark.parametrize("trials", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_trials_that_are_groups_of_workers_are_measured_and_stopped(
    trials: int, stores_dir: Path, tmp_path: Path
) -> None:
    """Ray Train inside of Ray Tune. The second group learns nothing and is stopped, with the energy of its best epoch.

    A group keeps one checkpoint only, so each must wait until its energy is measured.
    """
    ray.shutdown()  # it asks for a Ray with a dashboard
    alone = GROUPS.replace("trials: 2", "trials: 1").replace(", {optim.lr: 1.0e-7}]", "]")
    (tmp_path / "small.yaml").write_text(alone if trials == 1 else GROUPS)
    tune(tmp_path, stores_dir)
    results = json.loads((tmp_path / "runs" / "searches" / "small" / "report" / "results.json").read_text())
    assert [trial["status"] for trial in results["trials"]] == ["finished", "stopped"][:trials]
    runs = [Run(tmp_path / f"runs/searches/small/trials/small-000{number}") for number in range(trials)]
    for trial, run in zip(results["trials"], runs, strict=True):
        assert trial["figures"]["energy_mj"] > 0
        assert (run.path / "report" / "energy.json").is_file()
    if trials == 2:
        learnt, stopped = results["trials"]
        assert stopped["reason"] == "stopped by asha after epoch 2"
        assert learnt["figures"]["val/top1"] > stopped["figures"]["val/top1"]
        # On a busy machine a group may train another epoch until the word to stop reaches it.
        best = json.loads((runs[1].best_checkpoint() / "state.json").read_text())["best"]
        assert best["epoch"] >= stopped["epoch"]
