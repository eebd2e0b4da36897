"""MLflow's model directory around a network package: loader, signature, example, requirements."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spikefleet.config.recipes import parse_model
from spikefleet.config.task_table import find_task
from spikefleet.data_summary import DataSummary
from spikefleet.files import sha256_of
from spikefleet.registry import served_events
from spikefleet.registry.package import CODE, Card
from spikefleet.registry.served_input import EXPECTED
from spikefleet.registry.serving_code import serving_code
from spikefleet.registry.version import SERVING_FILES
from spikefleet.versions import code_version
from spikefleet_models.family import ModelConfig

if TYPE_CHECKING:
    from spikefleet.tasks import AnyTask

ARTIFACTS = "artifacts"
"""Where MLflow keeps the files of the package, in a model directory."""

_LOADER = Path(__file__).with_name("pyfunc_model.py")

_EXAMPLE_SIDE = 32
"""Largest side in pixels of the example request: images are resized, and a larger one would be megabytes of text."""


def save_for_mlflow(package: Path, model: Path, config: Mapping[str, Any], data: DataSummary, card: Card) -> None:
    """Writes MLflow's model directory: the package, the loader, the signature, an example and the requirements.

    Nothing in it names a directory of this machine.

    Args:
        package: directory of the package.
        model: the directory to write.
        config: configuration of the run.
        data: summary of its data.
        card: of the package.
    """
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    network, task = _served(config, data)
    given: dict[str, object]
    shown: NDArray[np.uint8] | list[dict[str, Any]]
    if data.sensor is None:
        expected, shown = EXPECTED, example_images(network.in_channels, task.input_size(data) or data.image_shape)
        given = {"size": task.input_size(data), "range": [0, 255]}
    else:
        expected, shown = served_events.EXPECTED, served_events.example(data.sensor)
        given = {"sensor": list(data.sensor), "timesteps": network.simulated_timesteps}
    # MLflow casts JSON to the type of a schema before the model sees it: to uint8, floats from 0 to 1 would be black
    # images. Of this type everything arrives as it was sent, and the model checks it.
    images = TensorSpec(np.dtype("O"), (-1,))
    # MLflow's schemas cannot describe a list of objects.
    outputs = None if task.served_columns is None else Schema([ColSpec("float", name) for name in task.served_columns])
    # Nor a list whose items are objects or nested lists: requests of events have no schema, and the model checks them.
    inputs = Schema([images]) if data.sensor is None else None
    signature = ModelSignature(inputs=inputs, outputs=outputs) if inputs or outputs else False
    code = serving_code()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of MLflow, about types that the example does not have
        pyfunc.save_model(
            path=str(model),
            python_model=str(_LOADER),
            artifacts={path.name: str(path) for path in sorted(package.iterdir())},
            signature=signature,
            model_config={"precision": "fp32"},  # MLflow lets a user change only what is here
            input_example=shown,
            metadata={
                "input": expected,
                "channels": network.in_channels,
                **given,
                "answer": find_task(config["task"]).answers,
                "classes": list(data.class_names),
                "code": {"sha256": card.sha256[CODE], "version": code_version()},
            },
            pip_requirements=code.requirements(),
        )
    written = Model.load(str(model))
    flavor = written.flavors[pyfunc.FLAVOR_NAME]
    flavor["model_code_path"] = _LOADER.name  # MLflow noted where each file was copied from
    for entry in flavor["artifacts"].values():
        entry["uri"] = entry["path"]
    written.save(str(model / "MLmodel"))


def serving_files(model: Path) -> dict[str, str]:
    """The SHA-256 of every file of a model directory beside the package, by its path in it.

    MLflow runs or obeys them (MLmodel, the loader, the requirements), and the content hash is of the package alone.
    """
    found = (path for path in model.rglob("*") if path.is_file())
    named = {path.relative_to(model).as_posix(): path for path in found}
    return {name: sha256_of(named[name]) for name in sorted(named) if not name.startswith(f"{ARTIFACTS}/")}


def serving_files_tag(model: Path) -> dict[str, str]:
    """`serving_files` as a tag of the version."""
    return {SERVING_FILES: json.dumps(serving_files(model))}


def example_images(channels: int, size: tuple[int, ...] | None) -> NDArray[np.uint8]:
    """An example request: one image uint8 `[1, C, H, W]` with a gradient in each direction.

    Args:
        channels: C.
        size: its last two are H and W, of which at most 32 are shown; None is as 32.
    """
    height, width = (min(side, _EXAMPLE_SIDE) for side in (size or (_EXAMPLE_SIDE, _EXAMPLE_SIDE))[-2:])
    rows, columns = np.linspace(0, 255, height), np.linspace(0, 255, width)
    image = (rows[:, None] + columns[None]) / 2
    return np.repeat(image.astype(np.uint8)[None, None], channels, axis=1)


def _served(config: Mapping[str, Any], data: DataSummary) -> tuple[ModelConfig, AnyTask]:
    from spikefleet.tasks import LossSettings, task_class  # imports torch, which searching the registry does not need

    network = parse_model(config["model"], "the configuration of a registered model")
    return network, task_class(config["task"]).build(network, data, LossSettings())
