"""A run's name is its identity: the same training goes on, another one is refused field by field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.runs.run_dir import Run, check_run_name, default_run_name, find_run
from spikefleet_pipelines.store.manifest import Manifest
from spikefleet_pipelines.store.reader import Store
from support.snapshots import small_snapshot


@pytest.fixture
def manifest(stores_dir: Path) -> Manifest:
    return Store.open(stores_dir / "digits", verify=False).manifest


@pytest.fixture
def config() -> Config:
    return load_config("digits", parse_overrides(["cluster.workers=2"]))


@pytest.mark.parametrize("name", ["a/b", "../a", "a\\b", "", ".hidden", "a" * 101, "a..b", "a\0b", "a b", "ａ"])
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="run name"):
        check_run_name(name)


def test_default_name_follows_what_is_learnt(config: Config) -> None:
    same = load_config("digits", parse_overrides(["cluster.workers=2", "cluster.max_failures=0"]))
    assert default_run_name(config) == default_run_name(same)
    for other in (["optim.lr=0.3", "cluster.workers=2"], ["cluster.workers=1"]):
        assert default_run_name(config) != default_run_name(load_config("digits", parse_overrides(other)))


def test_resumption_with_other_values_is_refused_field_by_field(
    config: Config, manifest: Manifest, tmp_path: Path
) -> None:
    run = Run(tmp_path / "mine")
    run.begin(config, DataSummary.of(manifest))
    run.begin(config, DataSummary.of(manifest))
    other = load_config("digits", parse_overrides(["model.timesteps=2", "optim.lr=0.3", "cluster.workers=4"]))
    with pytest.raises(UserError) as caught:
        run.begin(other, DataSummary.of(manifest))
    for part in (
        "model.timesteps: expected 4, found 2",
        "optim.lr: expected 0.1, found 0.3",
        "workers: expected 2, found 4",
    ):
        assert part in str(caught.value)
    assert "--name" in str(caught.value)
    changed = manifest.model_copy(update={"class_names": (*manifest.class_names[:-1], "nine")})
    with pytest.raises(UserError, match="data: expected content hash"):
        run.begin(config, DataSummary.of(changed))


def test_a_resumed_run_has_the_name_that_its_data_have_now(config: Config, manifest: Manifest, tmp_path: Path) -> None:
    """The name is no part of the content; runs of earlier versions have none."""
    run = Run(tmp_path / "mine")
    run.begin(config, replace(DataSummary.of(manifest), name=""))
    assert run.data().dataset == manifest.source
    run.begin(config, DataSummary.of(manifest.model_copy(update={"name": "renamed"})))
    assert run.data().dataset == "renamed"


def test_damaged_latest_checkpoint_is_refused(config: Config, manifest: Manifest, tmp_path: Path) -> None:
    run = Run(tmp_path / "mine")
    run.begin(config, DataSummary.of(manifest))
    path = run.checkpoints.save(3, small_snapshot())
    (path / "state.json").write_text("{ }")
    with pytest.raises(UserError, match=r"state.json is damaged.*remove"):
        run.begin(config, DataSummary.of(manifest))


def test_best_checkpoint_needs_an_evaluation(config: Config, manifest: Manifest, tmp_path: Path) -> None:
    run = Run(tmp_path / "mine")
    run.begin(config, DataSummary.of(manifest))
    with pytest.raises(UserError, match="no evaluated checkpoint yet"):
        run.best_checkpoint()
    run.checkpoints.save(3, small_snapshot(best_step=3))
    assert run.best_checkpoint() == tmp_path / "mine" / "checkpoints" / "step-00000003"


def test_missing_run_names_those_that_exist(config: Config, manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no runs"):
        find_run(tmp_path, "mine")
    Run(tmp_path / "yours").begin(config, DataSummary.of(manifest))
    with pytest.raises(UserError, match="expected one of yours"):
        find_run(tmp_path, "mine")
    assert find_run(tmp_path, "yours").config() == config


@pytest.mark.parametrize("content", ["", "[]", "null", "3", '{"a": 1}', "[" * 100_000])
@pytest.mark.parametrize("name", ["run.json", "config.json", "data.json", "checkpoint.json", "state.json"])
def test_a_damaged_file_is_named(name: str, content: str, config: Config, manifest: Manifest, tmp_path: Path) -> None:
    run, data = Run(tmp_path / "mine"), DataSummary.of(manifest)
    run.begin(config, data)
    checkpoint = run.checkpoints.save(3, small_snapshot(best_step=3))
    folder = run.path if (run.path / name).is_file() else checkpoint
    (folder / name).write_text(content)
    complaint = r"train.seed: expected no value" if (name, content) == ("config.json", '{"a": 1}') else name

    def use() -> None:
        run.begin(config, data)
        run.record()
        run.best_checkpoint()

    with pytest.raises(UserError, match=complaint if name != "checkpoint.json" else "checkpoint"):
        use()
