"""Which code serves a version: the installed spikefleet's where it reads the format, else that in the version."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.errors import UserError
from spikefleet.files import sha256_of
from spikefleet.registry import pyfunc_model, serving_code
from spikefleet.registry.api import RegisteredVersion, describe, load, renew
from spikefleet.registry.package import CARD, CODE
from spikefleet.registry.package_format import FORMAT
from support.registered import Trained, stored_files

FIXTURE = Path(__file__).parents[2] / "fixtures" / "loader_without_code"

CHOOSE = """
import importlib.util, json, sys
from pathlib import Path

def choose(package):
    try:
        loader.use_code(Path(package))
    except Exception as error:
        return str(error)
    from spikefleet.registry import package_format
    return [package_format.FORMAT, package_format.__file__]

spec = importlib.util.spec_from_file_location("loader", sys.argv[1])
loader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loader)
print(json.dumps([choose(package) for package in sys.argv[2:]]))
"""
"""What the loader does with package after package, in one process; it has imported no spikefleet."""


def choices(path: Path, *packages: Path) -> list[Any]:
    """What the loader chooses where `import spikefleet` looks in `path` first."""
    command = [sys.executable, "-c", CHOOSE, pyfunc_model.__file__, *map(str, packages)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(path), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=path)
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def changed(package: Path, folder: Path, **card: Any) -> Path:
    """A copy of a package with other entries in its card."""
    shutil.copytree(package, folder)
    content = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({**content, **card}))
    return folder


@pytest.fixture
def package(first: Trained, registered: RegisteredVersion) -> Path:
    return stored_files(first.uri, registered) / "artifacts"


def test_the_loader_names_what_the_package_names() -> None:
    assert (pyfunc_model.CARD, pyfunc_model.CODE, pyfunc_model.PACKAGES) == (CARD, CODE, serving_code.PACKAGES)


def test_an_installed_spikefleet_of_the_format_serves(first: Trained, registered: RegisteredVersion) -> None:
    mlflow.pyfunc.load_model(str(stored_files(first.uri, registered)))
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_CodeOfVersion"]


def test_a_spikefleet_of_another_format_leaves_it_to_the_code_of_the_version(package: Path, tmp_path: Path) -> None:
    other = tmp_path / "installed" / "spikefleet" / "registry"
    other.mkdir(parents=True)
    for folder in (other.parent, other):
        (folder / "__init__.py").write_text("")
    (other / "package_format.py").write_text("FORMAT = 7\n")
    hashes = json.loads((package / CARD).read_text())["sha256"]
    bare = {name: digest for name, digest in hashes.items() if name != CODE}
    swapped = changed(package, tmp_path / "swapped")
    (swapped / CODE).write_bytes((package / CODE).read_bytes() + b" ")
    refused, missing, own, again, in_use = choices(
        tmp_path / "installed",
        swapped,
        changed(package, tmp_path / "bare", sha256=bare),
        package,
        package,
        changed(package, tmp_path / "newer", format=9),
    )
    assert f"expected SHA-256 {hashes[CODE]}, found {sha256_of(swapped / CODE)}" in refused
    assert "brings no code of its own" in missing
    assert own == again == [FORMAT, f"{package / CODE}/spikefleet/registry/package_format.py"]
    assert f"which reads format {FORMAT}" in in_use
    assert "has format 9 and brings its own code" in in_use
    (sole,) = choices(tmp_path / "installed", changed(package, tmp_path / "seven", format=7))
    assert sole == [7, str(other / "package_format.py")]


def test_code_that_was_swapped_is_refused_here_too(
    first: Trained, registered: RegisteredVersion, package: Path, tmp_path: Path
) -> None:
    swapped = changed(package, tmp_path / "swapped")
    load(swapped)
    (swapped / CODE).write_bytes(b"other code")
    with pytest.raises(UserError, match=r"code\.zip is not the registered file: expected SHA-256"):
        load(swapped)


def without_code(model: Path, folder: Path) -> Path:
    """The model directory of a version as it was registered before the code travelled."""
    shutil.copytree(model, folder)
    (folder / "artifacts" / CODE).unlink()
    card = json.loads((folder / "artifacts" / CARD).read_text())
    del card["sha256"][CODE]
    card["format"] = 1
    (folder / "artifacts" / CARD).write_text(json.dumps(card))
    description = yaml.safe_load((folder / "MLmodel").read_text())
    del description["flavors"]["python_function"]["artifacts"][CODE]
    (folder / "MLmodel").write_text(yaml.safe_dump(description))
    shutil.copyfile(FIXTURE / "pyfunc_model.py", folder / "pyfunc_model.py")
    return folder


def test_a_version_without_code_is_served_as_ever_and_renewed_into_one_with_code(
    first: Trained, registered: RegisteredVersion, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    new = stored_files(first.uri, registered)
    old = without_code(new, tmp_path / "old")
    expected = mlflow.pyfunc.load_model(str(new)).predict(images)
    np.testing.assert_array_equal(mlflow.pyfunc.load_model(str(old)).predict(images), expected)
    load(old / "artifacts")

    client = mlflow.MlflowClient(first.uri, registry_uri=first.uri)
    client.create_registered_model("without_code")
    tags = {**client.get_model_version("digits", "1").tags, "spikefleet.content_hash": content_hash(old)}
    client.create_model_version("without_code", old.as_uri(), run_id=first.run_id, tags=tags)
    renewed = renew("models:/without_code/1", tracking_uri=first.uri)
    stored = stored_files(first.uri, renewed)
    assert (stored / "requirements.txt").read_text() == (new / "requirements.txt").read_text()
    assert sha256_of(stored / "artifacts" / CODE) == sha256_of(new / "artifacts" / CODE)
    assert describe(renewed.uri, tracking_uri=first.uri)["sha256"].keys() == {
        *describe("models:/without_code/1", tracking_uri=first.uri)["sha256"],
        CODE,
    }
    np.testing.assert_array_equal(mlflow.pyfunc.load_model(str(stored)).predict(images), expected)
    # A version that is current stays as it is.
    assert renew(renewed.uri, tracking_uri=first.uri) == renew("models:/without_code/2", tracking_uri=first.uri)
    assert renew(renewed.uri, tracking_uri=first.uri).version == renewed.version
    # Negative control: another loader alone, which the content hash does not cover.
    loader = stored / "pyfunc_model.py"
    loader.write_text(loader.read_text() + "# of an earlier release\n")
    assert renew(renewed.uri, tracking_uri=first.uri).version == renewed.version + 1


def test_the_command_says_that_a_version_is_current(
    first: Trained, registered: RegisteredVersion, tmp_path: Path
) -> None:
    done = CliRunner(env={"MLFLOW_TRACKING_URI": first.uri}).invoke(app, ["registry", "renew", "digits@champion"])
    assert done.exit_code == 0, done.output
    assert f"{registered.uri} (champion) is current" in done.stdout
    assert len(mlflow.MlflowClient(first.uri, registry_uri=first.uri).search_model_versions("name = 'digits'")) == 1


def content_hash(model: Path) -> str:
    from spikefleet.registry.package import verify_package

    return verify_package(model / "artifacts").content_hash


def test_nothing_names_a_directory_of_the_machine_that_registered(
    first: Trained, registered: RegisteredVersion
) -> None:
    stored = stored_files(first.uri, registered)
    texts = [path.read_text() for path in stored.iterdir() if path.is_file()]
    assert len(texts) > 5
    here = {str(Path.home()), str(Path(__file__).parents[3]), os.sep + "tmp" + os.sep, sys.prefix}
    assert [word for word in here for text in texts if word in text] == []


def test_a_version_shows_a_request_and_says_what_it_expects(first: Trained, registered: RegisteredVersion) -> None:
    stored = stored_files(first.uri, registered)
    served = mlflow.pyfunc.load_model(str(stored))
    example = json.loads((stored / "serving_input_example.json").read_text())
    assert np.shape(example["inputs"]) == (1, 1, 8, 8)
    assert served.predict(np.array(example["inputs"])).shape == (1, 10)
    said = served.metadata.metadata
    assert (said["size"], said["range"], said["channels"]) == ([8, 8], [0, 255], 1)
    assert said["classes"] == [str(k) for k in range(10)]
    text = mlflow.MlflowClient(first.uri, registry_uri=first.uri).get_model_version("digits", "1").description
    assert "8 x 8 pixels" in text
    assert "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in text
