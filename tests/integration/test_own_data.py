"""A recipe on one's own data: names of data set and registered model, and no alias for what learnt nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.tracking.mlflow_client import resolve_tracking_uri

DIGITS = load_digits()
AS_FOLDER = (
    "data.source=image_folder", "model.in_channels=3", "model.num_classes=3", "data.transform.normalise=none",
    "data.transform.crop_padding=0", "data.transform.random_resized_crop=8", "data.transform.resize=8",
    "data.transform.center_crop=8", "data.transform.random_resized_crop_scale=[0.9,1]",
)  # fmt: skip
SMALL = ("model.width=0.125", "model.timesteps=1", "train.epochs=1", "train.global_batch=64", "--workers", "0")


@pytest.fixture(scope="module")
def leaves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits of three classes as image files."""
    root = tmp_path_factory.mktemp("data") / "leaves"
    for number in np.flatnonzero(DIGITS.target < 3)[:180]:
        folder = root / ("val" if number % 3 == 0 else "train") / f"leaf {DIGITS.target[number]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((DIGITS.images[number] * 15.9).astype(np.uint8)).save(folder / f"{number}.png")
    return root


def ask(folder: Path, *words: str) -> str:
    places = () if words[0] == "registry" else ("--stores-dir", str(folder / "stores"))
    runs = ("--runs-dir", str(folder / "runs"))
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, *runs, *places], catch_exceptions=False)
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done.stdout


def test_a_network_on_ones_own_data_that_learns_nothing(leaves: Path, tmp_path: Path) -> None:
    """It is registered under the name of its data, without an alias, and says why."""
    root = f"data.root={leaves}"
    said = ask(tmp_path, "train", "digits", *AS_FOLDER, root, "optim.lr=1e-9", *SMALL, "--name", "own")
    assert "(leaves)" in said
    assert (
        "recipe digits was written for data set digits; on leaves the network is registered as sg_resnet_leaves" in said
    )
    assert "sg_resnet_leaves version 1 is without alias: version 1 must not be used: on test, it answers 'leaf" in said
    (model,) = json.loads(ask(tmp_path, "registry", "list", "--json"))
    (version,) = model["versions"]
    assert (model["name"], version["aliases"], version["tags"]["dataset"]) == ("sg_resnet_leaves", [], "leaves")
    assert "for all" in version["tags"]["flaw"]
    assert json.loads((tmp_path / "runs/own/data.json").read_text())["name"] == "leaves"
    uri = resolve_tracking_uri(tmp_path / "runs")
    assert MlflowClient(uri).get_run(version["run_id"]).data.tags["dataset"] == "leaves"
