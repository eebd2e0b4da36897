"""Raw images, the store that was prepared from them and the run that was trained on it often have one name."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.recipes import load_config
from spikefleet.data_access import store_at
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.inference.trained_network import open_trained_network
from spikefleet.runs.run_dir import Run, find_run
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.reader import Store


@pytest.fixture
def desk(stores_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `photos`, `stores/photos` and a run `photos` without a checkpoint."""
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / "photos").symlink_to(stores_dir / "digits")
    manifest = Store.open(stores_dir / "digits", verify=False).manifest
    Run(tmp_path / "runs" / "photos").begin(load_config("digits", {}), DataSummary.of(manifest))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_store_is_found_beside_the_folder_of_its_images(desk: Path) -> None:
    assert store_at("photos", Path("stores")) == "stores/photos"
    assert store_at("stores/photos", Path("stores")) == "stores/photos"
    assert store_at("s3://bucket/photos", Path("stores")) == "s3://bucket/photos"
    assert store_at("photos", Path("other")) == "photos"
    with pytest.raises(StoreError, match=r"photos is not a store: .* run `spikefleet data prepare auto photos --"):
        Store.open("photos")


def test_a_run_is_found_beside_the_folder_of_its_images_and_by_its_directory(desk: Path) -> None:
    for reference in ("photos", "runs/photos", "runs/photos/", str(desk / "runs" / "photos")):
        assert find_run(Path("runs"), reference).path == Path("runs/photos")
        with pytest.raises(UserError, match="run photos has no"):
            open_trained_network(reference, Path("runs"))
    with pytest.raises(UserError, match=r"photos/cats is neither a registered network .* nor a run"):
        open_trained_network("photos/cats", Path("runs"))
    (desk / "others").mkdir()
    with pytest.raises(UserError, match=r"run runs/photos is not in others; give --runs-dir .*/runs and the name "):
        find_run(Path("others"), "runs/photos")


def test_a_folder_in_place_of_a_source_is_told_apart(desk: Path) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["data", "prepare", "photos"])
    assert done.exit_code == 2
    assert "photos is a directory, and the name of a source comes first" in done.stderr
    assert "spikefleet data prepare auto photos" in done.stderr
    (desk / "digits").mkdir()  # a source of that name is a source
    assert "comes first" not in CliRunner().invoke(app, ["data", "prepare", "digits", "--option", "upsample=3"]).stderr
