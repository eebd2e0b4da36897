"""Model names and references, pulling a version into a directory, and a registry that is away."""

import json
from pathlib import Path

import pytest
import torch

from spikefleet.data_summary import DATA_SUMMARY
from spikefleet.errors import UserError
from spikefleet.registry.api import RegisteredVersion, describe, list_models, load, pull, show
from spikefleet.registry.package import CARD, CODE, CONFIG, WEIGHTS
from support.registered import Trained, load_network_of


@pytest.mark.parametrize(
    "name",
    ["", "..", "a/b", "a\\b", "../x", "a..b", "a\0b", "a\nb", "x" * 101, "%2e%2e", "a#b", "a@b", "dіgits", "-a", "a:b"],
)
def test_names_that_could_become_paths_are_refused(first: Trained, name: str) -> None:
    with pytest.raises(UserError, match="model name"):
        first.register(name)
    with pytest.raises(UserError, match="model name"):
        show(name, tracking_uri=first.uri)
    with pytest.raises(UserError, match=r"model name|not a registered version"):
        load(f"models:/{name}/1", tracking_uri=first.uri)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("models:/digit@champion", "registered model 'digit' does not exist; did you mean 'digits'"),
        ("models:/zebra@champion", "registered model 'zebra' does not exist; expected one of [a-z]"),
        ("models:/digits@best", "no alias 'best'; expected one of champion"),
        ("models:/digits/77", "no version 77; expected one of 1"),
        ("models:/digits", "expected models:/NAME@champion"),
        ("models:/digits/1/../../x", "expected models:/NAME@champion"),
        ("models:/digits/latest", "expected models:/NAME@champion"),
        ("no-such-directory", "is not a registered network"),
    ],
)
def test_a_reference_to_nothing_says_what_there_is(
    registered: RegisteredVersion, uri: str, reference: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load(reference, tracking_uri=uri)


def test_a_pulled_directory_loads_without_a_registry(
    first: Trained, registered: RegisteredVersion, pulled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert sorted(path.name for path in pulled.iterdir()) == [CARD, CODE, CONFIG, DATA_SUMMARY, WEIGHTS]
    batch = torch.rand(2, 1, 8, 8)
    assert torch.equal(load(pulled)(batch), load_network_of(first)[0](batch))
    here, there = describe(pulled), describe("models:/digits@champion", tracking_uri=first.uri)
    assert here["sha256"] == there["sha256"]
    assert here["config"] == there["config"] == first.config
    assert here["metrics"] == there["metrics"] == {"val/top1": 0.9, "test/top1": 0.89}
    assert here["tags"]["run_name"] == there["tags"]["run_name"] == "first"
    assert there["aliases"] == ["champion"]


def test_pulling_never_overwrites_and_leaves_nothing_behind(pulled: Path, uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an empty directory"):
        pull("models:/digits@champion", pulled, tracking_uri=uri)
    (tmp_path / "empty").mkdir()
    assert pull("models:/digits/1", tmp_path / "empty", tracking_uri=uri) == tmp_path / "empty"
    with pytest.raises(UserError, match="no version 9"):
        pull("models:/digits/9", tmp_path / "never", tracking_uri=uri)
    with pytest.raises(UserError, match="/dev/null/here cannot be created: File exists; choose another directory"):
        pull("models:/digits/1", Path("/dev/null/here"), tracking_uri=uri)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "pulled"]


def test_extra_files_travel_with_the_network(first: Trained, tmp_path: Path) -> None:
    (tmp_path / "card of energy").write_text('{"mj": 1.5}')
    version = first.register("energetic", extra_files={"energy.json": tmp_path / "card of energy"})
    out = pull(version.uri, tmp_path / "out", tracking_uri=first.uri)
    assert json.loads((out / "energy.json").read_text()) == {"mj": 1.5}
    with pytest.raises(UserError, match="plain file name"):
        first.register("energetic2", extra_files={"../energy.json": tmp_path / "card of energy"})


def test_a_registry_that_is_away_is_one_sentence_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the tracking server http://127.0.0.1:1 cannot be used: the connection is refused"
    ) as caught:
        list_models(tracking_uri="http://ann:s3cret@127.0.0.1:1")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(UserError, match="no registry exists at sqlite"):
        list_models(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []
