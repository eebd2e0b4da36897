"""The code of a registered model for MLflow ("models from code"); MLflow runs this file when it loads a version."""

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
    """Images uint8 [B, C, H, W] -> what the task serves: class probabilities float32 [B, K], or the objects of each.

    An object has a name, a score and a box, x1 y1 x2 y2 in the pixels of the image.
    """

    def load_context(self, context: Any) -> None:
        """Builds the network from the package beside this file, after checking its hashes."""
        load_plugins()
        package = Path(context.artifacts[CARD]).parent
        self._network, config = load_network(package)
        self._model = parse_model(config["model"], str(package))
        self._transform = parse_transform(config["data"]["transform"], str(package))
        self._task = task_class(config["task"]).build(self._model, DataSummary.read(package), LossSettings())

    # MLflow knows this type hint, and warns of most others and of none.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Any:
        """Resizes and normalises as in evaluation, then runs the network in fp32."""
        with torch.inference_mode():
            batch = image_batch(model_input, self._transform, self._model.in_channels)
            return self._task.serve(self._network, batch)


mlflow.models.set_model(RegisteredNetwork())
