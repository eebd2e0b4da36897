"""Registering real (tiny) networks with real MLflow in SQLite, and loading them again."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from spikefleet.errors import UserError
from spikefleet.registry.api import RegisteredVersion, list_models, load, show
from spikefleet.registry.package import CARD, CONFIG, WEIGHTS
from spikefleet_pipelines.in_memory import image_batch
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from support.registered import Trained, load_network_of, stored_files


def test_a_registered_network_says_what_a_deployer_asks(first: Trained, registered: RegisteredVersion) -> None:
    assert (registered.name, registered.version, registered.run_id) == ("digits", 1, first.run_id)
    assert registered.metrics == {"val/top1": 0.9, "test/top1": 0.89}
    network, _ = load_network_of(first)
    expected = {
        "task": "classification",
        "dataset": "digits",
        "timesteps": "4",
        "connection": "bsg",
        "decoder": "asd",
        "neuron": "if",
        "family": "sg_resnet",
        "seed": "0",
        "run_name": "first",
        "parameters": str(sum(parameter.numel() for parameter in network.parameters())),
    }
    assert {key: registered.tags[key] for key in expected} == expected
    assert registered.content_hash == show("digits", tracking_uri=first.uri).versions[-1].content_hash


def test_loading_gives_the_same_bits(first: Trained, registered: RegisteredVersion) -> None:
    original, _ = load_network_of(first)
    batch = torch.rand(4, 1, 8, 8)
    for reference in ("models:/digits@champion", "models:/digits/1"):
        network = load(reference, tracking_uri=first.uri)
        assert not network.training
        assert network.config.timesteps == 4
        assert torch.equal(network(batch), original(batch))


def test_mlflow_loads_it_in_a_fresh_process(
    first: Trained, registered: RegisteredVersion, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    program = """
        import sys, mlflow, numpy
        model = mlflow.pyfunc.load_model("models:/digits@champion")
        numpy.save(sys.argv[2], model.predict(numpy.load(sys.argv[1])))
        try:
            model.predict(numpy.zeros((1, 1, 8, 8), numpy.float32))
        except mlflow.exceptions.MlflowException as error:
            print(error)
    """
    np.save(tmp_path / "images.npy", images)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": first.uri}
    environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    arguments = [sys.executable, "-c", textwrap.dedent(program), tmp_path / "images.npy", tmp_path / "out.npy"]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "uint8" in done.stdout
    assert "UserWarning" not in done.stderr

    probabilities = np.load(tmp_path / "out.npy")
    network, config = load_network_of(first)
    transform = TransformConfig.model_validate(config["data"]["transform"])
    with torch.inference_mode():
        expected = network(image_batch(images, transform, channels=1).images).softmax(1).numpy()
    assert probabilities.shape == (5, 10)
    np.testing.assert_array_equal(probabilities, expected)


def test_a_version_holds_no_pickle_and_nothing_of_the_directory_it_came_from(
    first: Trained, registered: RegisteredVersion
) -> None:
    stored = stored_files(first.uri, registered)
    names = sorted(str(path.relative_to(stored)) for path in stored.rglob("*") if path.is_file())
    assert [name for name in names if name.endswith((".pkl", ".pt", ".pth", ".bin"))] == []
    assert {f"artifacts/{name}" for name in (WEIGHTS, CONFIG, CARD)} < set(names)
    assert not {"uv.lock", "pyproject.toml"} & set(names)
    assert "spikefleet" not in (stored / "requirements.txt").read_text()
    assert "python_model: " not in (stored / "MLmodel").read_text()


def test_the_same_content_of_the_same_run_is_one_version(first: Trained, tmp_path: Path) -> None:
    version = first.register("once")
    assert first.register("once") == version
    other = first.again(5, tmp_path).register("once")
    assert other.version == 2
    assert [v.version for v in show("once", tracking_uri=first.uri).versions] == [2, 1]


def test_a_crash_before_the_version_is_created_leaves_none(first: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", crash)
        with pytest.raises(KeyboardInterrupt):
            first.register("crashed")
    with pytest.raises(UserError, match="registered model 'crashed' does not exist"):
        show("crashed", tracking_uri=first.uri)
    assert first.register("crashed").version == 1


def test_weights_that_are_not_the_configurations_are_not_registered(first: Trained, tmp_path: Path) -> None:
    wider = first.again(1, tmp_path, width=0.25)
    with pytest.raises(UserError, match="expected shape"):
        wider.register("mismatch", config=first.config)
    with pytest.raises(UserError, match="does not exist"):
        first.register("mismatch", weights=tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="val/top1=nan must be finite"):
        first.register("mismatch", value=float("nan"))
    with pytest.raises(UserError, match="must have the keys"):
        first.register("mismatch", config={"model": first.config["model"]})
    with pytest.raises(UserError, match=r"model\.timestepz"):
        first.register("mismatch", config={**first.config, "model": {**first.config["model"], "timestepz": 4}})
    assert "mismatch" not in [model.name for model in list_models(tracking_uri=first.uri)]
