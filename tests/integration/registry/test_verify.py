"""A version is verified file by file; whatever is changed, in the storage or in the registry, is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spikefleet.audit.proof_again import prove_again
from spikefleet.cli import app
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.registry.api import RegisteredVersion, promote, pull
from spikefleet.registry.history import HEAD
from spikefleet.registry.package import CARD, CODE, CONFIG, WEIGHTS
from spikefleet.registry.verification import Verification, verify
from spikefleet_models.families import build_model
from spikefleet_pipelines.store.reader import Store
from support.registered import Trained, stored_files

Target = tuple[RegisteredVersion, Path]
SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def intact(first: Trained, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("verified")
    version = first.again(80, folder).register("verified")
    return version, stored_files(first.uri, version)


@pytest.fixture
def target(intact: Target, tmp_path: Path) -> Iterator[Target]:
    """A version whose stored files may be changed; put back afterwards."""
    _, stored = intact
    shutil.copytree(stored, tmp_path / "backup")
    yield intact
    shutil.rmtree(stored)
    shutil.copytree(tmp_path / "backup", stored)


def found_in(version: RegisteredVersion, uri: str) -> Verification:
    return verify(version.uri, tracking_uri=uri)


def test_an_intact_version_is_intact_in_every_file(intact: Target, uri: str, tmp_path: Path) -> None:
    version, stored = intact
    found = found_in(version, uri)
    assert found.intact, found.problems
    names = {str(path.relative_to(stored)).removeprefix("artifacts/") for path in stored.rglob("*") if path.is_file()}
    assert names <= {finding.subject for finding in found.findings}
    assert {"MLmodel", "pyfunc_model.py", "requirements.txt", CARD, CODE, WEIGHTS} <= names
    assert found.notes == ()
    pulled = verify(pull(version.uri, tmp_path / "pulled", tracking_uri=uri))
    assert pulled.intact
    assert "the card of the directory was trusted" in pulled.notes[0]


def swap_weights(stored: Path) -> None:
    path = stored / "artifacts" / WEIGHTS
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


def edit_card(stored: Path) -> None:
    path = stored / "artifacts" / CARD
    card = json.loads(path.read_text())
    card["facts"]["metrics"]["val/top1"] = 0.99
    path.write_text(json.dumps(card))


def append(name: str) -> Callable[[Path], None]:
    def change(stored: Path) -> None:
        with (stored / name).open("a") as file:
            file.write("\n# more\n")

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (swap_weights, f"{WEIGHTS} is not the registered file: expected SHA-256 "),
        (append(f"artifacts/{CONFIG}"), f"{CONFIG} is not the registered file"),
        (append(f"artifacts/{CODE}"), f"{CODE} is not the registered file"),
        (append("artifacts/data.json"), "data.json is not the registered file"),
        (append("pyfunc_model.py"), "pyfunc_model.py is not the registered file"),
        (append("MLmodel"), "MLmodel is not the registered file"),
        (append("requirements.txt"), "requirements.txt is not the registered file"),
        (append("sitecustomize.py"), "sitecustomize.py is not a file of the registered version, and MLflow may run it"),
        (edit_card, f"{CARD} is not the registered card: expected content hash "),
        (lambda stored: (stored / "artifacts" / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda stored: (stored / "artifacts" / CARD).unlink(), f"{CARD} is missing"),
        (lambda stored: (stored / "python_env.yaml").unlink(), "python_env.yaml is missing"),
    ],
)
def test_a_file_that_was_changed_is_named(
    target: Target, uri: str, change: Callable[[Path], object], named: str
) -> None:
    version, stored = target
    change(stored)
    found = found_in(version, uri)
    assert not found.intact
    assert [problem for problem in found.problems if problem.startswith(named)] == found.problems
    assert len(found.problems) == 1


def test_the_command_names_the_file_and_ends_with_1(
    target: Target, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = ["registry", "verify", "verified/1", "--runs-dir", str(runs)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "nothing has changed" in done.output
    swap_weights(target[1])
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, words)
    assert done.exit_code == 1
    assert (
        "models:/verified/1 is not what was registered: weights.safetensors is not the registered file" in done.output
    )
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 1
    assert not json.loads(done.stdout)["intact"]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("metric.val/top1", "0.99", "metric val/top1 of the version is 0.99, but 0.9 by card.json"),
        ("metric.test/top1", "best", "metric test/top1 of the version is missing, but 0.89 by card.json"),
        ("timesteps", "1", "tag timesteps of the version is '1', but '4' by its files"),
        ("spike_driven", "not spiking", "tag spike_driven of the version is 'not spiking', but 'proved' by its files"),
        ("parameters", "7", "tag parameters of the version is '7', but "),
        ("spikefleet.serving_files", "{", "tag spikefleet.serving_files of the version is damaged"),
    ],
)
def test_a_tag_that_was_edited_in_the_registry_is_named(
    first: Trained, intact: Target, uri: str, key: str, value: str, named: str
) -> None:
    version, _ = intact
    client = MlflowClient(uri, registry_uri=uri)
    before = client.get_model_version(version.name, str(version.version)).tags[key]
    client.set_model_version_tag(version.name, str(version.version), key, value)
    try:
        found = found_in(version, uri)
    finally:
        client.set_model_version_tag(version.name, str(version.version), key, before)
    assert len(found.problems) == 1
    assert found.problems[0].startswith(named)


def test_a_flaw_that_was_taken_off_is_named(first: Trained, uri: str, tmp_path: Path) -> None:
    version = first.again(81, tmp_path).register("verified_flaw", 0.05)
    assert version.tags["flaw"]
    assert found_in(version, uri).intact
    MlflowClient(uri, registry_uri=uri).delete_model_version_tag(version.name, str(version.version), "flaw")
    (problem,) = found_in(version, uri).problems
    assert problem.startswith("tag flaw of the version is 'missing', but 'on val, its top1 of 5.00%")


def test_what_earlier_releases_did_not_record_is_said(tmp_path: Path, uri: str, first: Trained) -> None:
    fixture = Path(__file__).parents[2] / "fixtures" / "format_1"
    shutil.copytree(fixture / "model", tmp_path / "model")
    client = MlflowClient(uri, registry_uri=uri)
    client.create_registered_model("verified_1")
    tags = {**json.loads((fixture / "tags.json").read_text()), "metric.val/top1": "0.25"}
    client.create_model_version("verified_1", (tmp_path / "model").as_uri(), run_id=first.run_id, tags=tags)
    found = verify("models:/verified_1/1", tracking_uri=uri)
    assert [problem.partition(",")[0] for problem in found.problems] == ["metric val/top1 of the version is 0.25"]
    tags = json.loads((fixture / "tags.json").read_text())
    client.set_model_version_tag("verified_1", "1", "metric.val/top1", tags["metric.val/top1"])
    found = verify("models:/verified_1/1", tracking_uri=uri)
    assert found.intact, found.problems
    assert "no hash covers the metrics and tags in card.json, which has format 1" in found.notes


def test_a_version_of_an_earlier_release_says_what_no_hash_covers(intact: Target, uri: str) -> None:
    version, _ = intact
    client = MlflowClient(uri, registry_uri=uri)
    before = client.get_model_version(version.name, "1").tags["spikefleet.serving_files"]
    client.delete_model_version_tag(version.name, "1", "spikefleet.serving_files")
    found = found_in(version, uri)
    client.set_model_version_tag(version.name, "1", "spikefleet.serving_files", before)
    assert found.intact
    (note,) = found.notes
    assert note.startswith("no hash covers MLmodel, conda.yaml, ")
    assert "`spikefleet registry renew verified/1`" in note


def test_a_history_that_was_edited_and_an_alias_that_was_moved_by_hand_are_said(
    first: Trained, uri: str, tmp_path: Path
) -> None:
    version = first.again(82, tmp_path).register("verified_history")
    promote(version.name, version.version, "val/top1", tracking_uri=uri)
    champion = "models:/verified_history@champion"
    found = verify(champion, tracking_uri=uri)
    assert found.intact
    assert "history" in [finding.subject for finding in found.findings]
    client = MlflowClient(uri, registry_uri=uri)
    client.set_registered_model_alias(version.name, "blessed", "1")
    (note,) = verify(champion, tracking_uri=uri).notes
    assert note.startswith("alias blessed was given to version 1 by hand")
    client.set_registered_model_tag(version.name, HEAD, f"1 {'0' * 64}")
    (problem,) = verify(champion, tracking_uri=uri).problems
    assert problem.startswith("the history of the aliases of verified_history is damaged: ")


# ------------------------------------------------------------------------------------------------ --prove


@pytest.fixture(scope="module")
def proved(first: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A network with the configuration of a whole run."""
    config = load_config("digits", parse_overrides(["model.stages=[1,1]", "model.width=0.125"]))
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("proved") / "weights.safetensors"
    save_file(build_model(config.model).state_dict(), weights)
    return replace(first, weights=weights, config=config.dump())


def with_verdict(origin: Trained, stores_dir: Path, folder: Path, name: str, verdict: str) -> str:
    """A version that came with a verdict of the spike check, whose data are the digits."""
    data = DataSummary.of(Store.open(stores_dir / "digits", verify=False).manifest)
    (folder / "spike_check.json").write_text(json.dumps({"verdict": verdict}))
    files = {"spike_check.json": folder / "spike_check.json"}
    tags = {**origin.tags, "spike_driven": verdict}
    return origin.register(name, extra_files=files, data=data, tags=tags).uri


def test_a_proof_is_made_again_on_the_data_or_on_generated_images(
    proved: Trained, uri: str, stores_dir: Path, tmp_path: Path
) -> None:
    reference = with_verdict(proved, stores_dir, tmp_path, "proved_again", "proved")
    whole = prove_again(reference, stores_dir, SILENT, tracking_uri=uri)
    assert whole.confirmed, whole.says
    assert [leg.name for leg in whole.check.legs] == ["deployed", "binary", "metric"]
    assert whole.images.startswith("the images of val that registration looked at")
    unlike = proved.register("proved_without_data").uri  # its data have a content hash that no store has
    without = prove_again(unlike, stores_dir, SILENT, tracking_uri=uri)
    assert [leg.name for leg in without.check.legs] == ["deployed", "binary"]
    assert (without.check.verdict, without.stored, without.confirmed) == ("proved", None, True)
    assert without.images.startswith("8 generated images, without the metric, since ")
    with pytest.raises(UserError, match="name the version's own data by --data"):
        prove_again(unlike, stores_dir, SILENT, data="digits", tracking_uri=uri)


def test_a_verdict_that_is_not_found_again_is_no_proof(
    proved: Trained, uri: str, runs: Path, stores_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    silent = {name: torch.zeros_like(tensor) for name, tensor in load_file(proved.weights).items()}
    save_file(silent, tmp_path / "silent.safetensors")
    mute = replace(proved, weights=tmp_path / "silent.safetensors")
    reference = with_verdict(mute, stores_dir, tmp_path, "proved_falsely", "proved")
    words = ["registry", "verify", reference, "--prove", "--runs-dir", str(runs), "--stores-dir", str(stores_dir)]
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, words)
    assert done.exit_code == 1
    assert "the spike check made again finds 'not shown'" in done.output
    assert "and the version says 'proved'" in done.output
    assert CliRunner().invoke(app, [word for word in words if word != "--prove"]).exit_code == 0
