"""Stored configurations with renamed keys still load; recipes and overrides get the new name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from spikefleet.config.recipes import load_config
from spikefleet.config.renamed import RENAMED_KEYS, with_current_keys
from spikefleet.config.schema import differences
from spikefleet.errors import UserError
from spikefleet.files import read_json, sha256_of, write_json
from spikefleet.inference.trained_network import open_trained_network
from spikefleet.registry.package import load_network
from spikefleet.runs.run_dir import Run
from spikefleet.training.checkpoints import load_checkpoint
from spikefleet_models.gates import Gate
from spikefleet_models.sg_resnet_config import SGResNetConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format_1"
ROWS = {"model.time_steps": "model.timesteps", "optimizer": "optim", "train.passes": "train.epochs"}


@pytest.fixture
def renamed() -> Iterator[None]:
    """The table as if three keys, one of them a section, had been renamed."""
    with pytest.MonkeyPatch.context() as patch:
        for old, new in ROWS.items():
            patch.setitem(RENAMED_KEYS, old, new)
        yield


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The fixture as a version before the renames would have written it."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    for listing in (tmp_path / "old").rglob("*.json"):
        if listing.name in ("card.json", "checkpoint.json"):
            config = listing.with_name("config.json")
            write_json(config, _with_old_keys(read_json(config)))
            content = read_json(listing)
            content["sha256"]["config.json"] = sha256_of(config)
            write_json(listing, content)
    config = tmp_path / "old" / "run" / "config.json"
    write_json(config, _with_old_keys(read_json(config)))
    return tmp_path / "old"


def _with_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(config))
    tree["model"]["time_steps"] = tree["model"].pop("timesteps")
    tree["train"]["passes"] = tree["train"].pop("epochs")
    tree["optimizer"] = tree.pop("optim")
    return tree


@pytest.mark.usefixtures("renamed")
def test_a_run_a_checkpoint_and_a_package_load_through_the_table(old: Path) -> None:
    run, now = Run(old / "run"), Run(FIXTURE / "run")
    assert run.config() == now.config()
    assert differences(read_json(run.path / "config.json"), now.config().dump()) == []
    checkpoint, original = run.checkpoints.latest(), now.checkpoints.latest()
    assert checkpoint is not None
    assert original is not None
    assert load_checkpoint(checkpoint).config == load_checkpoint(original).config
    assert open_trained_network(str(checkpoint), old).config == now.config()
    network, config = load_network(old / "model" / "artifacts")
    expected, original_config = load_network(FIXTURE / "model" / "artifacts")
    assert config == original_config
    images = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(images), expected(images))
    assert open_trained_network(str(old / "model" / "artifacts"), old).config.train.epochs == 2


def test_without_the_rows_they_are_refused(old: Path) -> None:
    run = Run(old / "run")
    checkpoint = run.checkpoints.latest()
    assert checkpoint is not None
    with pytest.raises(UserError, match=r"run run: .*unknown key 'model\.time_steps'"):
        run.config()
    with pytest.raises(UserError, match=r"unknown key 'train\.passes'"):
        open_trained_network(str(checkpoint), old)
    with pytest.raises(UserError, match=r"unknown key 'model\.time_steps'"):
        load_network(old / "model" / "artifacts")
    assert differences(read_json(run.path / "config.json"), Run(FIXTURE / "run").config().dump())


@pytest.mark.usefixtures("renamed")
@pytest.mark.parametrize(
    ("key", "new"), [("model.time_steps", "model.timesteps"), ("train.passes", "train.epochs"), ("optimizer", "optim")]
)
def test_a_recipe_or_an_override_gets_the_new_name(key: str, new: str) -> None:
    with pytest.raises(UserError, match=rf"unknown key '{key}'; it was renamed to '{new}'"):
        load_config("digits", {key: {} if key == "optimizer" else 1})


@pytest.mark.usefixtures("renamed")
def test_a_configuration_with_both_names_is_refused_not_merged(old: Path) -> None:
    config = read_json(old / "run" / "config.json")
    config["model"]["timesteps"] = 3
    write_json(old / "run" / "config.json", config)
    with pytest.raises(UserError, match=r"unknown key 'model\.time_steps'; it was renamed"):
        Run(old / "run").config()


@pytest.mark.usefixtures("renamed")
@pytest.mark.parametrize("stored", [{}, {"model": 3}, {"model": {"family": "spike_yolo"}, "train": None}, {"optim": 1}])
def test_sections_that_are_missing_or_values_stay_as_they_are(stored: dict[str, Any]) -> None:
    assert with_current_keys(stored) == stored


@pytest.mark.usefixtures("renamed")
def test_the_stored_configuration_is_not_modified() -> None:
    stored = {"model": {"family": "spike_yolo", "time_steps": 2}}
    assert with_current_keys(stored) == {"model": {"family": "spike_yolo", "timesteps": 2}}
    assert stored == {"model": {"family": "spike_yolo", "time_steps": 2}}


def test_runs_checkpoints_and_versions_that_lack_the_gate_gradient_keep_the_literal_one() -> None:
    assert SGResNetConfig().gate_gradient == "exact"
    assert "gate_gradient" not in read_json(FIXTURE / "run" / "config.json")["model"]
    run = Run(FIXTURE / "run")
    checkpoint = run.checkpoints.latest()
    assert checkpoint is not None
    assert run.config().dump()["model"]["gate_gradient"] == "literal"
    assert load_checkpoint(checkpoint).config["model"]["gate_gradient"] == "literal"
    opened = open_trained_network(str(checkpoint), FIXTURE)
    assert opened.config.dump()["model"]["gate_gradient"] == "literal"
    network, config = load_network(FIXTURE / "model" / "artifacts")
    assert config["model"]["gate_gradient"] == "literal"
    assert {module.gradient for module in network.modules() if isinstance(module, Gate)} == {"literal"}
    exact = run.config().dump()
    exact["model"]["gate_gradient"] = "exact"
    stored = read_json(FIXTURE / "run" / "config.json")
    assert differences(stored, exact) == ["model.gate_gradient: expected literal, found exact"]


def test_a_stored_detector_keeps_the_literal_gate_gradient_of_its_backbone() -> None:
    stored = load_config("scenes_retinanet").dump()
    assert stored["model"]["backbone"].pop("gate_gradient") == "exact"
    kept = with_current_keys(stored)
    assert kept["model"]["backbone"]["gate_gradient"] == "literal"
    assert "gate_gradient" not in kept["model"]


@pytest.mark.parametrize("decayed", [True, False])
def test_runs_that_lack_it_decay_their_gates_with_the_norms(decayed: bool) -> None:
    stored = load_config("digits", {"optim.decay_norm_and_bias": decayed}).dump()
    del stored["optim"]["decay_gates"]
    assert with_current_keys(stored)["optim"]["decay_gates"] is decayed
    stored["optim"]["decay_gates"] = not decayed
    assert with_current_keys(stored)["optim"]["decay_gates"] is not decayed


def test_former_defaults_of_side_branches_stay_where_there_are_branches_and_tell_nothing_where_there_are_none() -> None:
    former = {"loss": "summed_logits", "schedule": "linear", "lambda0": 0.25}
    current = load_config("digits").dump()
    without = current | {"shortcut": current["shortcut"] | former}
    assert differences(without, current) == differences(current, without) == differences(without, without) == []
    branched = load_config("digits", {"shortcut": {"where": "stage"}}).dump()
    stored = branched | {"shortcut": branched["shortcut"] | former}
    assert with_current_keys(stored)["shortcut"] == stored["shortcut"]
    told = differences(stored, branched)
    assert [line.partition(":")[0] for line in told] == ["shortcut.lambda0", "shortcut.loss", "shortcut.schedule"]
