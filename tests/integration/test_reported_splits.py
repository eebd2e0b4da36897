"""What is reported: the best and the last checkpoint, on test images, on validation images, or without a choice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from spikefleet import registry
from spikefleet.cli import app
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import CheckpointConfig
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.runs.options import Options
from spikefleet.runs.train_run import FinishedRun, run_training
from spikefleet.search.run_search import run_tracked_search
from spikefleet.tasks import build_task
from spikefleet.tasks.per_image import PER_IMAGE, Answers, PerImage
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.training.checkpoints import best_network, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.evaluation import evaluate
from spikefleet.training.events import EpochDone, Phase
from spikefleet.training.loop import Outcome, _improves, train
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.search_file import search_of
from support.events import KeptEvents

SMALL = ["model.width=0.125", "model.timesteps=1", "train.global_batch=216", "cluster.workers=0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Digits of which none are held out for validation."""
    return prepare("digits", None, tmp_path_factory.mktemp("whole") / "digits", holdout=0)


def trained(store: Store, run_dir: Path, *overrides: str) -> tuple[Outcome, KeptEvents]:
    config, events = load_config("digits", parse_overrides([*SMALL, *overrides])), KeptEvents()
    return train(config, store, run_dir, ProcessGroup.single(), events), events


def measured(store: Store, checkpoint: Path, split: str) -> float:
    """Top-1 of a checkpoint."""
    snapshot = load_checkpoint(checkpoint)
    config = load_config("digits", parse_overrides(SMALL))
    task = build_task(config, DataSummary.of(store.manifest))
    loader = BatchLoader(store.split(split), config.data.transform, train=False)
    found = evaluate(best_network(snapshot, config.model), task, loader, config.train, ProcessGroup.single())
    assert found is not None
    return task.metrics(found.predictions, found.targets)["top1"]


# --------------------------------------------------------------------------------------------------- best and last


@pytest.mark.parametrize(
    ("mode", "before", "now", "better"),
    [
        ("max", 0.9, 0.9, True),
        ("max", 0.9, 0.91, True),
        ("max", 0.9, 0.89, False),
        ("min", 0.9, 0.9, True),
        ("min", 0.9, 0.89, True),
        ("min", 0.9, 0.91, False),
    ],
)
def test_of_equal_epochs_the_later_one_is_the_best(mode: Any, before: float, now: float, better: bool) -> None:
    config = CheckpointConfig(metric="top1", mode=mode)
    assert _improves(config, {"metrics": {"top1": before}}, {"top1": now}) is better


def test_the_last_checkpoint_is_tested_beside_the_best(stores_dir: Path, tmp_path: Path, no_figures: None) -> None:
    """By mode=min the best epoch is the worst one, the first."""
    store = Store.open(stores_dir / "digits")
    settings = ["train.epochs=4", "checkpoint.mode=min", "optim.lr=0.02"]
    outcome, events = trained(store, tmp_path, *settings)
    folder = tmp_path / "checkpoints"
    assert Path(outcome.best_checkpoint) != folder / f"step-{outcome.steps:08d}"
    assert outcome.test == {**outcome.test, "top1": measured(store, Path(outcome.best_checkpoint), "test")}
    last = measured(store, folder / f"step-{outcome.steps:08d}", "test")
    assert outcome.last["test/top1"] == last != outcome.test["top1"]
    assert outcome.last.keys() == {"test/top1", "test/top5"}
    assert outcome.reported["last/test/top1"] == last
    assert outcome.reported["test/top1"] == outcome.test["top1"]
    assert "the last checkpoint" in "; ".join(events.notes)


def test_a_last_checkpoint_that_is_the_best_is_tested_once(stores_dir: Path, tmp_path: Path, no_figures: None) -> None:
    outcome, events = trained(Store.open(stores_dir / "digits"), tmp_path, "train.epochs=1")
    assert outcome.last == {f"test/{name}": value for name, value in outcome.test.items()}
    assert [event.what for event in events.seen if isinstance(event, Phase)].count("testing") == 1
    assert "the last checkpoint" not in "; ".join(events.notes)


# ------------------------------------------------------------------------------------------- without a validation split


def test_without_validation_images_the_last_epoch_is_reported(whole: Store, tmp_path: Path, no_figures: None) -> None:
    assert whole.manifest.splits == {"train": 1438, "test": 359}
    outcome, events = trained(whole, tmp_path, "train.epochs=3", "checkpoint.every_epochs=2")
    assert "the data have no validation split: the last epoch is reported" in "; ".join(events.notes)
    assert "the last checkpoint" in "; ".join(events.notes)
    assert Path(outcome.best_checkpoint).name == f"step-{outcome.steps:08d}"
    assert outcome.validation == {}
    assert outcome.last == {f"test/{name}": value for name, value in outcome.test.items()}
    assert outcome.test["top1"] == measured(whole, Path(outcome.best_checkpoint), "test")
    epochs = [event for event in events.seen if isinstance(event, EpochDone)]
    assert not any(key.startswith("val/") for event in epochs for key in event.metrics)
    assert not any(event.best for event in epochs)
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == [
        "step-00000014",
        "step-00000021",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def logged(uri: str, name: str) -> set[str]:
    """Keys of the metrics of a run of one version, in MLflow."""
    version = registry.show(name, tracking_uri=uri).pick(1)
    return set(MlflowClient(uri).get_run(version.run_id).data.metrics)


@pytest.fixture(scope="module")
def finished(whole: Store, runs: Path) -> FinishedRun:
    learning = ["train.epochs=6", "train.global_batch=72"]  # one epoch answers one digit for all images
    config = load_config("digits", parse_overrides([*SMALL, *learning, f"data.store={whole.location}"]))
    return run_training(config, Options(runs, runs / "stores"), Console(quiet=True), "whole")


def test_such_a_version_is_certified_on_training_images_and_stays_challenger(finished: FinishedRun) -> None:
    record = finished.run.record()
    assert record["validation"] == {}
    assert record["last"] == finished.last == {f"test/{key}": value for key, value in finished.test.items()}
    certificate = json.loads((finished.run.path / "report" / "certificate.json").read_text())
    assert certificate["split"] == "train"
    assert json.loads((finished.run.path / "report" / "evaluation.json").read_text())["split"] == "test"
    by_image = PerImage.read(finished.run.path / "report" / PER_IMAGE)
    assert (by_image.split, by_image.data_hash) == ("test", finished.run.data().content_hash)
    assert isinstance(by_image.results, Answers)
    assert by_image.results.right.mean() == finished.test["top1"]
    assert finished.promotion is not None
    assert finished.promotion.alias == "challenger"
    assert finished.promotion.champion is None
    assert "trained without a validation split" in finished.promotion.reason
    uri = resolve_tracking_uri(finished.run.path.parent)
    keys = logged(uri, "sg_resnet_digits")
    assert {"test/top1", "last/test/top1"} <= keys
    assert not [key for key in keys if "val/" in key]
    version = registry.show("sg_resnet_digits", tracking_uri=uri).pick(1)
    assert {key.partition("/")[0] for key in version.metrics} == {"test", "energy_mj", "latency_ms"}
    assert version.aliases == ("challenger",)
    # A user may compare test metrics by naming them.
    promoted = registry.promote("sg_resnet_digits", 1, "test/top1", tracking_uri=uri)
    assert promoted.alias == "champion"


def test_a_search_needs_validation_images(whole: Store, tmp_path: Path) -> None:
    search = search_of(
        {
            "recipe": "digits",
            "overrides": {"data.store": whole.location},
            "space": {"optim.lr": {"choice": [0.1, 0.2]}},
            "objectives": {"val/top1": "max"},
            "budget": {"trials": 2},
        }
    )
    with pytest.raises(
        UserError, match=r"has no validation split, by which a search.* set data\.options\.holdout above 0"
    ):
        run_tracked_search(search, "none", Options(tmp_path / "runs", tmp_path), Console(quiet=True))


# ------------------------------------------------------------------------------- validation images under a second name


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright and dark images in ImageNet's layout."""
    draw, root = np.random.default_rng(0), tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 12), ("val", 3)):
        for name, level in (("bright", 200), ("dark", 60)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.normal(level, 20, (40 + number, 50, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return root


IMAGENET = [
    "model.width=0.125",
    "model.num_classes=2",
    "model.timesteps=1",
    "train.epochs=8",
    "train.global_batch=8",
    "train.precision=fp32",
    "data.transform.random_resized_crop=32",
    "data.transform.resize=36",
    "data.transform.center_crop=32",
    "data.loader_processes=0",
    "registry.name=imagenet_sg_resnet18",  # the images are not ImageNet's
]


def test_imagenets_validation_images_are_called_val(imagenet: Path, runs: Path, tmp_path: Path) -> None:
    """In the table, the record, MLflow, the registry and the report; no figure of theirs is called test."""
    places = ["--runs-dir", str(runs)]
    stores = ["--stores-dir", str(tmp_path / "stores")]
    settings = [*IMAGENET, f"data.root={imagenet}"]
    words = ["train", "imagenet_sg_resnet18", "--name", "small", "--workers", "0", *settings, *places, *stores]
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, words)
    assert done.exit_code == 0, done.output
    header = next(line for line in done.stdout.splitlines() if "metric" in line)
    assert re.findall(r"[a-z]+", header) == ["metric", "val", "last", "epoch", "val"]
    record = json.loads((runs / "small" / "run.json").read_text())
    assert record["test"] == {}
    assert record["last"].keys() == {"val/top1"}
    evaluation = json.loads((runs / "small" / "report" / "evaluation.json").read_text())
    assert (evaluation["split"], evaluation["samples"]) == ("val", 6)
    assert PerImage.read(runs / "small" / "report" / PER_IMAGE).split == "val"
    assert evaluation["metrics"]["top1"] == record["validation"]["top1"]
    uri = resolve_tracking_uri(runs)
    keys = logged(uri, "imagenet_sg_resnet18")
    assert {"val/top1", "last/val/top1", "best/val/top1"} <= keys
    assert not [key for key in keys if "test/" in key]
    version = registry.show("imagenet_sg_resnet18", tracking_uri=uri).pick(1)
    assert version.aliases == ("champion",)
    assert {key.partition("/")[0] for key in version.metrics} == {"val", "energy_mj", "latency_ms"}
    # `test` still opens these images, under their name.
    words = ["evaluate", "small", "--split", "test", *places, *stores]
    said = CliRunner(env={"COLUMNS": "120"}).invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "on 6 val samples" in said.stdout


def test_with_images_held_out_of_train_they_are_a_test(imagenet: Path, tmp_path: Path, no_figures: None) -> None:
    store = prepare("image_folder", imagenet, tmp_path / "store")
    assert store.manifest.splits == {"train": 22, "val": 2, "test": 6}
    config = load_config("imagenet_sg_resnet18", parse_overrides([*IMAGENET, "cluster.workers=0"]))
    outcome = train(config, store, tmp_path / "run", ProcessGroup.single(), KeptEvents())
    assert outcome.test.keys() == {"top1"}
    assert outcome.last.keys() == {"test/top1"}
