"""registry export: a registered version and a pulled directory as files, compared on the digits' test images."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from torch import nn
from typer.testing import CliRunner, Result

for library in ("onnx", "onnxruntime", "onnxscript", "nir"):
    pytest.importorskip(library, reason="spikefleet[export] is not installed")

from spikefleet.cli import app  # noqa: E402
from spikefleet.config.recipes import load_config  # noqa: E402
from spikefleet.export import nir_graph  # noqa: E402
from spikefleet.export.extras import NEEDED  # noqa: E402
from spikefleet.export.origin import full_reference  # noqa: E402
from spikefleet.files import sha256_of  # noqa: E402
from spikefleet.registry.api import RegisteredVersion, pull  # noqa: E402
from support.registered import Trained  # noqa: E402

Export = Callable[..., Result]


@pytest.fixture(scope="module")
def export(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    places = ["--runs-dir", str(runs), "--stores-dir", str(tmp_path_factory.mktemp("stores"))]

    def run(network: str, form: str, out: Path, *options: str) -> Result:
        words = ["registry", "export", network, "--format", form, "--out", str(out), *places, *options]
        return CliRunner(env={"COLUMNS": "400"}).invoke(app, words)

    return run


def narrow(first: Trained, seed: int, folder: Path, **overrides: Any) -> Trained:
    """A narrow network with the whole configuration of a run."""
    trained = first.again(seed, folder, **{"width": 0.125, "timesteps": 2, **overrides})
    whole = load_config("digits", {"data.options": {}}).model_dump(mode="json")
    return replace(trained, config={**whole, "model": trained.config["model"]})


@pytest.fixture(scope="module")
def rate(first: Trained, tmp_path_factory: pytest.TempPathFactory) -> RegisteredVersion:
    """A version with a firing-rate decoder, which every format takes."""
    return narrow(first, 5, tmp_path_factory.mktemp("rate"), decoder="rate").register("rate")


@pytest.fixture(scope="module")
def attention(first: Trained, tmp_path_factory: pytest.TempPathFactory) -> RegisteredVersion:
    return narrow(first, 6, tmp_path_factory.mktemp("attention")).register("attention")


def recorded(first: Trained, version: RegisteredVersion, form: str) -> Any:
    client = MlflowClient(first.uri, registry_uri=first.uri)
    tags = client.get_model_version(version.name, str(version.version)).tags
    return json.loads(tags[f"spikefleet.export.{form}"]) if f"spikefleet.export.{form}" in tags else None


def test_int8_weights_are_exported_smaller_and_recorded_beside_fp32(
    export: Export, first: Trained, rate: RegisteredVersion, tmp_path: Path
) -> None:
    path = tmp_path / "small.onnx"
    done = export("rate/1", "onnx", path, "--precision", "int8")
    assert done.exit_code == 0, done.output
    assert "as onnx, weights in int8:" in done.output
    description = json.loads(Path(f"{path}.json").read_text())
    assert description["precision"] == "int8"
    assert recorded(first, rate, "onnx.int8")["sha256"] == sha256_of(path)


@pytest.mark.parametrize("form", ["onnx", "nir", "spikes"])
def test_a_version_is_exported_compared_and_recorded(
    export: Export, first: Trained, rate: RegisteredVersion, form: str, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / f"net.{form}"
    done = export("rate/1", form, out, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    beside = {"onnx": (".json",), "nir": (".json", ".test.npz"), "spikes": (".json",)}[form]
    assert sorted(out.parent.iterdir()) == sorted([out, *(Path(f"{out}{suffix}") for suffix in beside)])
    assert said["files"] == [str(out), *(f"{out}{suffix}" for suffix in beside)]
    assert said["sha256"] == sha256_of(out)
    assert said["comparison"]["images"] == 359
    assert said["comparison"]["same_class"] == 359
    assert said["comparison"]["max_difference"] <= 1e-4
    described = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    assert described["network"] == rate.uri
    assert described["content_hash"] == rate.content_hash
    assert described["spike_driven"] == "proved"
    assert described["classes"] == [str(digit) for digit in range(10)]
    assert (described["timesteps"], described["input"]["height"], described["input"]["pixel_range"]) == (2, 8, [0, 255])
    stored = recorded(first, rate, form)
    assert stored == described["export"]
    assert stored["sha256"] == said["sha256"]
    again = export("rate/1", form, out)
    assert again.exit_code == 2
    assert "exists; give another place, or --force" in again.output


def test_a_file_that_is_another_network_is_refused_and_leaves_nothing(
    export: Export, first: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = narrow(first, 7, tmp_path, decoder="rate").register("refused")
    real = nir_graph.nir_graph

    def broken(network: nn.Module, *rest: Any) -> Any:
        other = copy.deepcopy(network)
        nn.init.ones_(other.get_parameter("classifier.bias"))
        return real(other, *rest)

    monkeypatch.setattr(nir_graph, "nir_graph", broken)
    folder = tmp_path / "out"
    done = export("refused/1", "nir", folder / "a.nir", "--images", "20")
    assert done.exit_code == 1
    assert "outputs differ from the network's by" in done.output
    assert list(folder.iterdir()) == []
    assert recorded(first, version, "nir") is None


def test_a_pulled_directory_is_exported_without_a_registry(
    export: Export, rate: RegisteredVersion, uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pulled = pull(rate.uri, tmp_path / "pulled", tracking_uri=uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    done = export(str(pulled), "spikes", tmp_path / "a.spikes", "--images", "3", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert not said["recorded"]
    assert said["network"] == str(pulled)
    inside = export(str(pulled), "spikes", pulled / "weights.safetensors", "--force")
    assert inside.exit_code == 2
    assert "would overwrite what the command reads" in inside.output


def test_what_nir_lacks_is_one_sentence(export: Export, attention: RegisteredVersion, tmp_path: Path) -> None:
    done = export("attention/1", "nir", tmp_path / "a.nir")
    assert done.exit_code == 2
    assert "the network cannot be written as NIR: decoder: attention multiplies spikes" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "missing"), [("onnx", "onnxruntime"), ("nir", "nir")])
def test_a_missing_extra_is_one_sentence(
    export: Export, form: str, missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert missing in NEEDED[form]
    monkeypatch.setitem(sys.modules, missing, None)
    done = export("digits@champion", form, tmp_path / "a")
    assert done.exit_code == 2
    assert done.output.strip() == (
        f"error: --format {form} needs {missing}, which is not installed; install spikefleet[export]"
    )


def test_references() -> None:
    assert full_reference("a.b@champion") == "models:/a.b@champion"
    assert full_reference("a/3") == "models:/a/3"
    assert full_reference("models:/a/3") == "models:/a/3"
    assert full_reference("run-1") == "run-1"
    assert full_reference("runs/run-1/checkpoints/7") == "runs/run-1/checkpoints/7"


def test_a_directory_wins_over_a_version_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert full_reference("a/3") == "a/3"
