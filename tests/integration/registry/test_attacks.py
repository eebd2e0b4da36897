"""Attacks on the stored files of a version: planted pickles, and weights that are swapped."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from spikefleet.data_summary import DATA_SUMMARY
from spikefleet.errors import UserError
from spikefleet.files import sha256_of
from spikefleet.registry.api import RegisteredVersion, load, pull
from spikefleet.registry.package import CARD, CODE, CONFIG, WEIGHTS, load_network
from support.registered import Trained, stored_files


class Bomb:
    """Leaves a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


@pytest.fixture
def target(first: Trained, tmp_path: Path) -> Iterator[tuple[RegisteredVersion, Path]]:
    """A version whose stored files an attacker may change; put back afterwards."""
    version = first.register("target")
    stored = stored_files(first.uri, version)
    shutil.copytree(stored, tmp_path / "backup")
    yield version, stored
    shutil.rmtree(stored)
    shutil.copytree(tmp_path / "backup", stored)


def rewrite_card(package: Path, **names: str) -> None:
    """What an attacker does who can also change the card."""
    card = json.loads((package / CARD).read_text())
    card["sha256"] |= {name: sha256_of(package / name) for name in card["sha256"]} | names
    (package / CARD).write_text(json.dumps(card))


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_planted_pickles_are_never_executed(
    target: tuple[RegisteredVersion, Path], uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, stored = target
    marker = tmp_path / "marker"
    for name in ("python_model.pkl", "model.pkl", "weights.pt", "data/model.pth", "pickle_module_info.txt"):
        for place in (stored, stored / "artifacts"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(pickle.dumps(Bomb(marker)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    load(version.uri, tracking_uri=uri)
    mlflow.set_tracking_uri(uri)
    mlflow.pyfunc.load_model(version.uri)
    out = pull(version.uri, tmp_path / "out", tracking_uri=uri)
    assert sorted(path.name for path in out.iterdir()) == [CARD, CODE, CONFIG, DATA_SUMMARY, WEIGHTS]

    # MLflow told to take the pickle: refused by its switch.
    description = (stored / "MLmodel").read_text()
    lines = [line for line in description.splitlines() if "model_code_path" not in line]
    flavor = lines.index("  python_function:")
    lines[flavor + 1 : flavor + 1] = ["    python_model: python_model.pkl", "    cloudpickle_version: 3.0.0"]
    (stored / "MLmodel").write_text("\n".join(lines))
    with pytest.raises(mlflow.exceptions.MlflowException, match="pickle is disallowed"):
        mlflow.pyfunc.load_model(version.uri)
    load(version.uri, tracking_uri=uri)
    assert not marker.exists()


def bomb_as_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(marker)))


def bomb_as_torch_file(path: Path, marker: Path) -> None:
    torch.save(Bomb(marker), path)


def bomb_behind_safetensors(path: Path, marker: Path) -> None:
    """A polyglot: valid safetensors at the head, a zip of a torch file at the tail."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(marker)))


@pytest.mark.parametrize("plant", [bomb_as_pickle, bomb_as_torch_file, bomb_behind_safetensors])
@pytest.mark.parametrize("card_too", [False, True])
def test_swapped_weights_are_refused_by_hash(
    target: tuple[RegisteredVersion, Path], uri: str, tmp_path: Path, plant: Any, card_too: bool
) -> None:
    version, stored = target
    expected = sha256_of(stored / "artifacts" / WEIGHTS)
    plant(stored / "artifacts" / WEIGHTS, tmp_path / "marker")
    found = sha256_of(stored / "artifacts" / WEIGHTS)
    if card_too:
        rewrite_card(stored / "artifacts")
        sentence = rf"card\.json is not the registered card: expected content hash {version.content_hash}"
    else:
        sentence = rf"weights\.safetensors is not .* expected SHA-256 {expected}, found {found}"
    with pytest.raises(UserError, match=sentence):
        load(version.uri, tracking_uri=uri)
    with pytest.raises(UserError, match=sentence):
        pull(version.uri, tmp_path / "out", tracking_uri=uri)
    mlflow.set_tracking_uri(uri)
    with pytest.raises(UserError, match=r"SHA-256|not a valid safetensors"):  # MLflow's loader knows the card alone
        mlflow.pyfunc.load_model(version.uri)
    assert not (tmp_path / "marker").exists()


def test_weights_that_work_but_are_others_are_refused_by_hash(
    target: tuple[RegisteredVersion, Path], first: Trained, tmp_path: Path
) -> None:
    version, stored = target
    shutil.copyfile(first.again(99, tmp_path).weights, stored / "artifacts" / WEIGHTS)
    rewrite_card(stored / "artifacts")
    load_network(stored / "artifacts")  # the files agree with one another ...
    with pytest.raises(UserError, match="the stored files were modified"):  # ... but not with the registry
        load(version.uri, tracking_uri=first.uri)
