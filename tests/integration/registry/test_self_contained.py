"""A version is served by what is in it and by what its requirements name, in a process that can import nothing else."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from spikefleet.config.recipes import load_config
from spikefleet.data_summary import DATA_SUMMARY, DataSummary
from spikefleet.inference.image_lists import list_of_images
from spikefleet.inference.prediction import predict_files
from spikefleet.inference.predictor import Predictor
from spikefleet.inference.trained_network import open_trained_network
from spikefleet.registry.api import RegisteredVersion, pull
from spikefleet.registry.package import CODE, write_package
from spikefleet.registry.served_network import ServedNetwork
from spikefleet.registry.serving_code import PACKAGES
from spikefleet_models.families import build_model, model_config
from spikefleet_models.kernels import native_library, unit_form
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig
from spikefleet_pipelines.transforms.event_detection_config import EventDetectionTransformConfig
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig
from support.alone import Alone, alone, closure
from support.cpu_forms import COMPILER
from support.registered import DIGITS, Trained, stored_files

UNWANTED = ("ray", "optuna", "pycocotools", "pyarrow", "sklearn", "flask", *PACKAGES)
"""Installed here, and needed by no requirement of a version."""

SCENES = DataSummary("scenes", "s" * 64, tuple("abc"), (1, 2, 3), (3, 64, 64))

MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sew": ("sew_resnet18", {"stages": (1, 1), "width": 0.125, "block": "bottleneck", "in_channels": 1}),
    "ann": ("resnet18", {"stages": (1, 1), "width": 0.125}),
    "bsg_star": ("sg_resnet_tiny", {"stages": (1, 1), "connection": "bsg_star", "decoder": "rate"}),
    "transformer": ("spike_yolo_tiny", {"num_classes": 3, "high_block": "transformer", "width": 0.125}),
    "yolov8": ("spiking_yolov8_m", {"num_classes": 3, "width": 0.125, "depth": 0.1}),
    "retinanet": ("retinanet_tiny", {"num_classes": 3}),
    "seven_b_net": ("seven_b_net_narrow", {"channels": (16, 16), "timesteps": 2}),
    "small_event_net": ("small_event_net", {"timesteps": 2}),
    "events_yolo": ("spike_yolo_tiny", {"num_classes": 3, "in_channels": 2, "width": 0.125, "timesteps": 2}),
}
"""One narrow member of each family and of each kind of module that is not in the two that are registered."""


def register(first: Trained, name: str, recipe: str, data: DataSummary, **settings: Any) -> RegisteredVersion:
    """Registers a network with random weights under the whole configuration of a recipe."""
    config = load_config(recipe, {"cluster.workers": 0, **settings})
    torch.manual_seed(0)
    weights = first.weights.parent / f"{name}.safetensors"
    save_file(build_model(config.model).state_dict(), weights)
    return first.register(name, weights=weights, config=config.dump(), data=data)


def package_of(member: str, folder: Path) -> tuple[Path, list[Any]]:
    """A package of a narrow network with random weights, and images or events that fit it."""
    name, settings = MEMBERS[member]
    model = model_config(name, **settings)
    torch.manual_seed(0)
    save_file(build_model(model).state_dict(), folder / "weights.safetensors")
    data, side = (SCENES, 64) if model.task == "detection" else (DIGITS, 8)
    transform: Any = DetectionTransformConfig(size=64)
    images: list[Any] = pixels(1, model.in_channels, side, side).tolist()
    if model.in_channels == 2:
        data = replace(data, image_shape=(2, side, side), sensor=(side, side))
        transform = EventsTransformConfig() if model.task == "classification" else EventDetectionTransformConfig()
        images = [{"t": [0, 9, 40], "x": [1, 2, 3], "y": [3, 2, 1], "p": [1, 0, 1], "height": side, "width": side}]
    elif model.task == "classification":
        transform = TransformConfig(normalise="digits")
    if model.in_channels == 3 and model.task == "classification":  # its augmentation travels with no version
        transform = TransformConfig(normalise="cifar10", auto_augment="cifar10", cutout=2)
    config = {
        "task": model.task,
        "model": model.model_dump(mode="json"),
        "data": {"source": data.source, "transform": transform.model_dump(mode="json")},
    }
    (package := folder / member).mkdir()
    data.write(folder)
    write_package(package, folder / "weights.safetensors", config, {DATA_SUMMARY: folder / DATA_SUMMARY}, {})
    return package, images


def pixels(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module")
def versions(first: Trained) -> dict[str, RegisteredVersion]:
    return {
        "classifier": register(first, "alone_digits", "digits", DIGITS),
        "detector": register(
            first,
            "alone_scenes",
            "scenes_spike_yolo",
            SCENES,
            **{"model.num_classes": 3, "model.criterion.score_threshold": 0, "data.transform.size": 64},
        ),
    }


@pytest.fixture(scope="module")
def requirements(first: Trained, versions: dict[str, RegisteredVersion]) -> list[str]:
    """Those of both versions, which are the same."""
    texts = {(stored_files(first.uri, one) / "requirements.txt").read_text() for one in versions.values()}
    (text,) = texts
    return text.split()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any]]]:
    folder = tmp_path_factory.mktemp("packages")
    return {member: package_of(member, folder) for member in MEMBERS}


@pytest.fixture(scope="module")
def served(
    first: Trained,
    versions: dict[str, RegisteredVersion],
    requirements: list[str],
    packages: dict[str, tuple[Path, list[Any]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Alone]:
    with alone(
        tmp_path_factory.mktemp("alone"),
        requirements,
        unwanted=UNWANTED,
        serve={name: str(stored_files(first.uri, one)) for name, one in versions.items()},
        open={member: [str(package), images] for member, (package, images) in packages.items()},
    ) as process:
        yield process


def command_line(name: str, version: RegisteredVersion, first: Trained, folder: Path, image: Path) -> dict[str, Any]:
    """What `spikefleet predict models:/NAME/VERSION IMAGE --score 0` answers."""
    trained = open_trained_network(str(pull(version.uri, folder / name, tracking_uri=first.uri)), folder)
    answers: list[Any] = []
    predict_files(trained, list_of_images([str(image)]), Predictor(trained, score=0), answered=answers.append)
    (answer,) = answers
    return answer


def test_requirements_are_what_inference_needs(requirements: list[str]) -> None:
    names = [line.partition("==")[0] for line in requirements]
    assert len(names) < 12
    assert all("==" in line for line in requirements)
    assert not {"ray", "optuna", "matplotlib", "pycocotools", "spikefleet", "mlflow"} & set(names)
    assert {"mlflow-skinny", "torch", "spikingjelly"} <= set(names)
    needed = closure(requirements)
    assert {"fastapi", "pandas", "nvidia-cublas" if torch.version.cuda else "sympy"} <= needed  # the closure is deep
    assert not {"ray", "optuna", "pycocotools", "spikefleet", "scikit-learn"} & needed


def test_a_classifier_answers_over_http_as_the_command_line(
    served: Alone, versions: dict[str, RegisteredVersion], first: Trained, tmp_path: Path
) -> None:
    image = pixels(28, 40)
    Image.fromarray(image).save(tmp_path / "image.png")
    (answer,) = served.ask("classifier", image[None, None].tolist())
    expected = command_line("classifier", versions["classifier"], first, tmp_path, tmp_path / "image.png")
    assert len(expected["classes"]) == 5
    for one in expected["classes"]:
        assert answer[one["name"]] == pytest.approx(one["probability"], abs=1e-6)


def test_a_detector_answers_over_http_as_the_command_line(
    served: Alone, versions: dict[str, RegisteredVersion], first: Trained, tmp_path: Path
) -> None:
    image = pixels(50, 70, 3)
    Image.fromarray(image).save(tmp_path / "image.png")
    (answer,) = served.ask("detector", image.transpose(2, 0, 1)[None].tolist())
    expected = command_line("detector", versions["detector"], first, tmp_path, tmp_path / "image.png")
    assert len(answer) == len(expected["objects"]) > 0
    for one, wanted in zip(answer, expected["objects"], strict=True):
        assert one["name"] == wanted["name"]
        assert one["score"] == pytest.approx(wanted["score"], abs=1e-5)
        assert one["box"] == pytest.approx(wanted["box"], abs=1e-2)


def test_the_example_of_a_version_is_a_request(
    served: Alone, versions: dict[str, RegisteredVersion], first: Trained
) -> None:
    for name, answers in (("classifier", 10), ("detector", 300)):
        example = json.loads((stored_files(first.uri, versions[name]) / "serving_input_example.json").read_text())
        (answer,) = served.ask(name, example["inputs"])
        assert 0 < len(answer) <= answers


@pytest.mark.parametrize("member", MEMBERS)
def test_the_code_in_a_version_serves_every_family(
    served: Alone, packages: dict[str, tuple[Path, list[Any]]], member: str
) -> None:
    package, images = packages[member]
    here = ServedNetwork.open(package).answer(images)
    if isinstance(here, list):
        assert [len(objects) for objects in here] == [len(objects) for objects in served.answers[member]]
        scores = [one["score"] for one in here[0]]
        assert [one["score"] for one in served.answers[member][0]] == pytest.approx(scores, abs=1e-5)
    else:
        np.testing.assert_allclose(served.answers[member], here.to_numpy(), atol=1e-6)


def test_a_version_is_served_in_the_form_that_its_latency_was_measured_in(served: Alone) -> None:
    assert served.form == unit_form(torch.device("cpu"))


def test_what_travels_is_what_serving_imports(served: Alone, first: Trained, versions: Any, requirements: Any) -> None:
    assert served.refused == list(UNWANTED) == [name for name in UNWANTED if find_spec(name)]  # all are installed here
    modules = served.imported()
    ours = {name: file for name, file in modules.items() if name.partition(".")[0] in PACKAGES}
    code = stored_files(first.uri, versions["classifier"]) / "artifacts" / CODE
    assert all(str(file).startswith(f"{code}/") for file in ours.values()), ours
    with zipfile.ZipFile(code) as archive:
        names = archive.namelist()
    travelled = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names if name.endswith(".py")
    }
    # Without a compiler the native form is not asked for.
    unused = (
        set() if COMPILER else {f"spikefleet_models.kernels.native_{part}" for part in ("check", "integers", "unit")}
    )
    assert travelled - unused == set(ours)
    kernels = {f"spikefleet_models/kernels/{name}" for name in native_library.SOURCES}
    assert {name for name in names if not name.endswith(".py")} == kernels
    assert not {"matplotlib", "mlflow.server", "pycocotools", "ray"} & set(modules)
    assert {"torch", "torchvision", "mlflow", "pandas"} <= set(modules)  # the process says what it imported
