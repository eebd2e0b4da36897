"""The serving code of a registered model ("models from code"): MLflow runs this file when it loads a version."""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import BAD_REQUEST, MlflowException

from spikefleet.config.recipes import parse_model, parse_transform
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.plugins import load_plugins
from spikefleet.registry.package import CARD, load_network
from spikefleet.registry.served_input import batches
from spikefleet.tasks import LossSettings, task_class
from spikefleet_pipelines.in_memory import image_batch


class RegisteredNetwork(mlflow.pyfunc.PythonModel):
    """A network for MLflow: images `[B, C, H, W]`, integers from 0 to 255 -> what its task serves.

    Images are resized as by `spikefleet predict`, each for itself where their sizes differ. Classification serves a
    probability for each class, a table `[B, K]` with the names of the classes; detection serves the objects of each
    image, with name, score and box (x1 y1 x2 y2 in pixels of the image).
    """

    def load_context(self, context: Any) -> None:
        """Verifies the package beside this file and builds its network. Raises UserError if it is not intact."""
        load_plugins()
        package = Path(context.artifacts[CARD]).parent
        self._network, config = load_network(package)
        self._model = parse_model(config["model"], str(package))
        self._transform = parse_transform(config["data"]["transform"], str(package))
        data = DataSummary.read(package)
        self._task = task_class(config["task"]).build(self._model, data, LossSettings())
        self._size = self._task.input_size(data)

    # MLflow supports this type hint; it warns about most others, and about none.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Any:
        """Resizes and preprocesses images as in evaluation, and runs the network in fp32.

        Raises:
            MlflowException: the images are not integers from 0 to 255 in the form `[B, C, H, W]`; of other errors the
                server of MLflow does not show the message.
        """
        channels = self._model.in_channels
        try:
            given = list(batches(model_input, channels, self._size))
        except UserError as error:
            raise MlflowException(str(error), error_code=BAD_REQUEST) from None
        with torch.inference_mode():
            answers = [
                self._task.serve(self._network, image_batch(images, self._transform, channels)) for images in given
            ]
        return self._task.joined(answers)


mlflow.models.set_model(RegisteredNetwork())
