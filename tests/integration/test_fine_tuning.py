"""Fine-tuning: what is taken of a trained network is known by its content, what is frozen stays as it is, bit by "
"bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from spikefleet import api, registry
from spikefleet.errors import UserError
from spikefleet.runs.initial_weights import INIT
from spikefleet.training.checkpoints import INITIAL_WEIGHTS, best_weights

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

SMALL: dict[str, Any] = {
    "data.source": "image_folder",
    "data.transform.normalise": "none",
    "data.transform.crop_padding": 0,
    "data.transform.random_resized_crop": 8,
    "data.transform.resize": 8,
    "data.transform.center_crop": 8,
    "data.transform.random_resized_crop_scale": [0.9, 1],
    "model.in_channels": 3,
    "model.width": 0.125,
    "model.timesteps": 1,
    "train.epochs": 1,
    "train.global_batch": 32,
}


def digits_of(root: Path, classes: int, first: int) -> Path:
    digits = load_digits()
    for number in range(300):
        label = int(digits.target[number])
        if first <= label < first + classes:
            path = root / "train" / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registered network of three digits, and the data of two others."""
    place = tmp_path_factory.mktemp("tuned")
    for name, classes, first in (("three", 3, 0), ("two", 2, 5)):
        digits_of(place / name, classes, first)
    train(place, "three", name="base", **{"registry.name": "base_digits"})
    return place


def train(place: Path, data: str, name: str | None = None, **overrides: Any) -> api.Run:
    wanted = {**SMALL, "data.root": str(place / data), "model.num_classes": 3 if data == "three" else 2, **overrides}
    return api.train(
        "digits",
        wanted,
        workers=0,
        name=name,
        runs_dir=place / "runs",
        stores_dir=place / "stores",
        console=Console(quiet=True),
    )


def weights_of(run: api.Run) -> dict[str, torch.Tensor]:
    return load_file(best_weights(run.finished.run.best_checkpoint()))


def test_another_head_frozen_parts_and_their_lineage(place: Path) -> None:
    base = load_file(best_weights(place / "runs/base/checkpoints" / best(place)))
    overrides: dict[str, Any] = {"init.from": "models:/base_digits/1", "train.freeze": ["stem", "stages.0"]}
    overrides |= {"registry.name": "tuned_digits", "optim.lr_factors": {"stages.1": 0.0001}}
    run = train(place, "two", **overrides)
    folder = run.finished.run.path
    record = json.loads((folder / INIT).read_text())
    assert record["resolved"] == "models:/base_digits/1"
    width = base["classifier.weight"].shape[1]
    anew = [f"classifier.weight [2, {width}] (there [3, {width}])", "classifier.bias [2] (there [3])"]
    assert record["anew"] == anew
    assert record["unused"] == []
    taken = load_file(folder / INITIAL_WEIGHTS)
    assert set(taken) == set(base) - {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(taken[name], base[name]) for name in taken)
    tuned = weights_of(run)
    frozen = [name for name in tuned if name.startswith(("stem.", "stages.0."))]
    assert any("running_var" in name for name in frozen)
    assert all(torch.equal(tuned[name], base[name]) for name in frozen)
    moved = {name: float((tuned[name] - base[name]).norm()) for name in taken if tuned[name].ndim > 1}
    assert 0 < moved["stages.1.0.convs.1.weight"] < 0.01 * moved["stages.2.0.convs.1.weight"]
    assert not torch.equal(tuned["stages.1.0.units.0.bn.running_mean"], base["stages.1.0.units.0.bn.running_mean"])
    # The same command finds the run; its weights come with the version, and are said.
    assert train(place, "two", **overrides).finished.run.name == folder.name
    uri = f"sqlite:///{place / 'runs' / 'mlflow.db'}"
    card = registry.card_text("models:/tuned_digits/1", tracking_uri=uri)
    assert "* init_from: models:/base_digits/1." in card
    assert f"* init_sha256: {record['sha256']}." in card


def best(place: Path) -> str:
    from spikefleet.runs.run_dir import Run

    return Run(place / "runs/base").best_checkpoint().name


def test_other_weights_are_another_run(place: Path) -> None:
    weights = load_file(best_weights(place / "runs/base/checkpoints" / best(place)))
    file = place / "w.safetensors"
    save_file(weights, file)
    quiet = {"registry.register_best": False}
    first = train(place, "three", **quiet, **{"init.from": str(file)})
    again = train(place, "three", **quiet, **{"init.from": "base"})
    assert first.finished.run.name == again.finished.run.name  # the same weights by another name
    save_file({name: value * 1.01 for name, value in weights.items()}, file)
    other = train(place, "three", **quiet, **{"init.from": str(file)})
    assert other.finished.run.name != first.finished.run.name
    with pytest.raises(UserError, match=r"was started with another configuration: train\.initial_weights: expected"):
        train(place, "three", name=first.finished.run.name, **quiet, **{"init.from": str(file)})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"init.from": "gone"}, "run 'gone' does not exist"),
        ({"init.from": "gone.safetensors"}, "there is no such file"),
        ({"init.from": "runs/base"}, "neither a registered version nor a .safetensors file.*by its name alone"),
        ({"init.from": "gone.pt"}, "are pickles, which are not read here.*spikefleet convert gone.pt"),
        ({"init.from": "models:/gone@champion"}, "gone"),
        ({"init.from": "base", "model.width": 0.25}, r"none of its \d+ tensors|has the name and the shape"),
        ({"init.from": "base", "train.freeze": ["stage.0"]}, r"train\.freeze has 'stage\.0'.*did you mean 'stages\.0'"),
        ({"train.freeze": ["stem", "stages", "classifier"]}, "leaves no parameter to train"),
        ({"optim.lr_factors": {"hed": 2.0}}, r"optim\.lr_factors has 'hed', which is no module"),
        ({"optim.lr_factors": {"stem": -1.0}}, r"optim\.lr_factors\.stem.*greater than 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    place: Path, overrides: dict[str, Any], message: str
) -> None:
    before = sorted(path.name for path in (place / "runs").iterdir())
    with pytest.raises(UserError, match=message):
        train(place, "three", **overrides)
    assert sorted(path.name for path in (place / "runs").iterdir()) == before
