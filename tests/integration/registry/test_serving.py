"""A served version answers as the command line does, and refuses what it would misread."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

from spikefleet.config.recipes import load_config
from spikefleet.data_summary import DataSummary
from spikefleet.inference.prediction import predict_images
from spikefleet.inference.trained_network import TrainedNetwork, in_precision
from spikefleet.registry.api import RegisteredVersion
from spikefleet.registry.package import load_network
from support.registered import Trained


@pytest.fixture(scope="module")
def served(first: Trained, registered: RegisteredVersion) -> Any:
    mlflow.set_tracking_uri(first.uri)
    mlflow.set_registry_uri(first.uri)
    return mlflow.pyfunc.load_model("models:/digits@champion")


def ask(served: Any, body: dict[str, Any]) -> tuple[int, Any]:
    """What `mlflow models serve` answers to a POST of JSON to /invocations."""
    try:
        done = scoring_server.invocations(
            json.dumps(body), "application/json", served, served.metadata.get_input_schema()
        )
    except MlflowException as error:
        return error.get_http_status_code(), str(error.message)
    return done.status, json.loads(done.response) if done.status == 200 else done.response


def opened(pulled: Path) -> TrainedNetwork:
    """As `open_trained_network` opens a version; that of these tests has no configuration of a training."""
    network, config = load_network(pulled)
    run = load_config("digits", {"model": config["model"], "data.transform": config["data"]["transform"]})
    return TrainedNetwork(str(pulled), network, run, DataSummary.read(pulled))


def command_line(pulled: Path, images: list[np.ndarray[Any, Any]]) -> list[list[tuple[str, float]]]:
    trained = opened(pulled)
    found = [trained.task.report.answer(one) for _, one in predict_images(trained, images)]
    return [[(one["name"], one["probability"]) for one in answer["classes"]] for answer in found]


@pytest.mark.parametrize("side", [8, 64, 5])
def test_images_of_any_size_get_the_answer_of_the_command_line(
    served: Any, pulled: Path, side: int, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(side).integers(0, 256, (3, 1, side, side + side // 8), np.uint8)
    status, answer = ask(served, {"inputs": pixels.tolist()})
    assert status == 200, answer
    for one, expected in zip(answer["predictions"], command_line(pulled, list(pixels)), strict=True):
        assert set(one) == {str(k) for k in range(10)}
        for name, probability in expected:
            assert one[name] == pytest.approx(probability, abs=1e-6)
    table = served.predict(pixels)
    assert list(table.columns) == [str(k) for k in range(10)]
    np.testing.assert_allclose(table.to_numpy().sum(axis=1), 1, rtol=1e-5)
    Image.fromarray(pixels[0, 0]).save(tmp_path / "first.png")
    trained = opened(pulled)
    ((_, prediction),) = predict_images(trained, [tmp_path / "first.png"])
    best = trained.task.report.answer(prediction)["classes"][0]["name"]
    assert table.columns[table.to_numpy()[0].argmax()] == best


def test_a_version_is_served_with_int8_weights(first: Trained, registered: RegisteredVersion, pulled: Path) -> None:
    mlflow.set_tracking_uri(first.uri)
    mlflow.set_registry_uri(first.uri)
    pixels = np.random.default_rng(7).integers(0, 256, (4, 1, 8, 8), np.uint8)
    low = mlflow.pyfunc.load_model("models:/digits@champion", model_config={"precision": "int8"})
    found = low.predict(pixels).to_numpy()
    expected = [one for _, one in predict_images(in_precision(opened(pulled), "int8"), list(pixels))]
    for row, ranking in zip(found, expected, strict=True):
        for position, probability in zip(ranking.classes, ranking.probabilities, strict=True):
            assert row[position] == pytest.approx(probability, abs=1e-6)
    exact = mlflow.pyfunc.load_model("models:/digits@champion").predict(pixels).to_numpy()
    assert not np.array_equal(found, exact)
    with pytest.raises(Exception, match="precision is 'int4', expected one of fp32, bf16, int8"):
        mlflow.pyfunc.load_model("models:/digits@champion", model_config={"precision": "int4"})


def test_images_of_several_sizes_are_answered_each_for_itself(served: Any, pulled: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (1, side, side), np.uint8) for side in (8, 64, 8)]
    status, answer = ask(served, {"inputs": [one.tolist() for one in images]})
    assert status == 200, answer
    for one, expected in zip(answer["predictions"], command_line(pulled, images), strict=True):
        assert max(one, key=one.get) == expected[0][0]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([[[[0.5] * 8] * 8]], "image 0 has values of type float64"),
        ([[[[0.0] * 8] * 8]], "image 0 has values of type float64"),
        ([[[[1.0, 255] * 4] * 8]], "image 0 has values of type float64"),
        ([[[[256] * 8] * 8]], "image 0 has values from 256 to 256, expected 0 to 255"),
        ([[[[-1] * 8] * 8]], "expected 0 to 255"),
        ([[[[True] * 8] * 8]], "image 0 has values of type bool"),
        ([[[["a"] * 8] * 8]], "image 0 has values of type"),
        ([[[[None] * 8] * 8]], "image 0 has values of type"),
        ([[[1, 2], [1]]], "image 0 has rows of different lengths"),
        ([[[1] * 8] * 8], r"image 0 has shape \[8, 8\]"),
        ([[[[1] * 8] * 8] * 3], r"image 0 has shape \[3, 8, 8\]"),
        ([[[[1] * 8] * 8], [[[1] * 8] * 8] * 2], r"image 1 has shape \[2, 8, 8\]"),
        (3, "expected images"),
        ([[[]]], "image 0 has shape"),
    ],
)
def test_what_would_be_misread_is_refused_with_what_is_expected(served: Any, inputs: Any, said: str) -> None:
    status, answer = ask(served, {"inputs": inputs})
    assert status == 400, answer
    assert re.search(said, answer), answer
    assert "integers (uint8) from 0 to 255" in answer


def test_floats_from_python_are_refused_and_other_integers_read(served: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8))
    expected = served.predict(pixels.astype(np.uint8)).to_numpy()
    np.testing.assert_array_equal(served.predict(pixels).to_numpy(), expected)
    with pytest.raises(Exception, match=r"type float32; expected images .* multiply floats from 0 to 1 by 255"):
        served.predict((pixels / 255).astype(np.float32))


def test_a_version_says_what_it_expects(served: Any, first: Trained, registered: RegisteredVersion) -> None:
    assert "integers (uint8) from 0 to 255" in served.metadata.metadata["input"]
    version = mlflow.MlflowClient(first.uri, registry_uri=first.uri).get_model_version("digits", "1")
    assert "integers (uint8) from 0 to 255" in version.description
    assert served.metadata.get_output_schema().input_names() == [str(k) for k in range(10)]
