"""The code of a registered model for MLflow ("models from code"); MLflow runs this file when it loads a version."""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch

from spikefleet.files import read_json
from spikefleet.registry.package import CARD, load_network, model_config, picture_batch
from spikefleet.runs.run_dir import DATA_FACTS
from spikefleet.tasks.detection import Detection
from spikefleet_models.build import build_criterion


class RegisteredNetwork(mlflow.pyfunc.PythonModel):
    """Images uint8 [B, C, H, W] -> class probabilities float32 [B, K]; from a detector, the objects of each image.

    An object has a name, a score and a box, x1 y1 x2 y2 in the pixels of the image.
    """

    def load_context(self, context: Any) -> None:
        """Builds the network from the package beside this file, after checking its hashes."""
        package = Path(context.artifacts[CARD]).parent
        self._network, self._config = load_network(package)
        self._detection: Detection | None = None
        if self._config["task"] == "detection":
            facts = read_json(package / DATA_FACTS)
            criterion = build_criterion(model_config(self._config, str(package)))
            self._detection = Detection(criterion, facts["class_names"], facts["category_ids"])

    # MLflow knows this type hint, and warns of most others and of none.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Any:
        """Resizes and normalises as in evaluation, then runs the network in fp32."""
        batch = picture_batch(model_input, self._config)
        with torch.inference_mode():
            if self._detection is not None:
                found = self._detection.predict(self._network, batch)
                return [self._detection.answer(one)["objects"] for one in found]
            return self._network(batch.images).float().softmax(dim=1).numpy()


mlflow.models.set_model(RegisteredNetwork())
