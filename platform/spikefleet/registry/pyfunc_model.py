"""The serving code of a registered model ("models from code"): MLflow runs this file when it loads a version."""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch

from spikefleet.config.recipes import parse_model, parse_transform
from spikefleet.data_summary import DataSummary
from spikefleet.plugins import load_plugins
from spikefleet.registry.package import CARD, load_network
from spikefleet.tasks import LossSettings, task_class
from spikefleet_pipelines.in_memory import image_batch


class RegisteredNetwork(mlflow.pyfunc.PythonModel):
    """A network for MLflow: uint8 images `[B, C, H, W]` -> what its task serves.

    Classification serves probabilities, float32 `[B, K]`; detection serves the objects of each image, with name, score
    and box (x1 y1 x2 y2 in pixels of the image).
    """

    def load_context(self, context: Any) -> None:
        """Verifies the package beside this file and builds its network. Raises UserError if it is not intact."""
        load_plugins()
        package = Path(context.artifacts[CARD]).parent
        self._network, config = load_network(package)
        self._model = parse_model(config["model"], str(package))
        self._transform = parse_transform(config["data"]["transform"], str(package))
        self._task = task_class(config["task"]).build(self._model, DataSummary.read(package), LossSettings())

    # MLflow supports this type hint; it warns about most others, and about none.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Any:
        """Preprocesses images, uint8 `[B, C, H, W]`, as in evaluation, and runs the network in fp32."""
        with torch.inference_mode():
            batch = image_batch(model_input, self._transform, self._model.in_channels)
            return self._task.serve(self._network, batch)


mlflow.models.set_model(RegisteredNetwork())
