"""The code of a registered model for MLflow ("models from code"); MLflow runs this file when it loads a version."""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch

from spikefleet.data_summary import DataSummary
from spikefleet.plugins import load_plugins
from spikefleet.registry.package import CARD, load_network, model_config, picture_batch
from spikefleet.tasks import LossSettings, task_class


class RegisteredNetwork(mlflow.pyfunc.PythonModel):
    """Images uint8 [B, C, H, W] -> what the task serves: class probabilities float32 [B, K], or the objects of each.

    An object has a name, a score and a box, x1 y1 x2 y2 in the pixels of the image.
    """

    def load_context(self, context: Any) -> None:
        """Builds the network from the package beside this file, after checking its hashes."""
        load_plugins()
        package = Path(context.artifacts[CARD]).parent
        self._network, self._config = load_network(package)
        model = model_config(self._config, str(package))
        self._task = task_class(self._config["task"]).build(model, DataSummary.read(package), LossSettings())

    # MLflow knows this type hint, and warns of most others and of none.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Any:
        """Resizes and normalises as in evaluation, then runs the network in fp32."""
        with torch.inference_mode():
            return self._task.serve(self._network, picture_batch(model_input, self._config))


mlflow.models.set_model(RegisteredNetwork())
