"""The code of a registered model for MLflow ("models from code"); MLflow runs this file when it loads a version."""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch

from spikefleet.network_package import CARD, load_network, preprocess


class RegisteredNetwork(mlflow.pyfunc.PythonModel):
    """Class probabilities float32 [B, K] of images uint8 [B, C, H, W]."""

    def load_context(self, context: Any) -> None:
        """Builds the network from the package beside this file, after checking its hashes."""
        self._network, self._config = load_network(Path(context.artifacts[CARD]).parent)

    # MLflow knows this type hint, and warns of most others and of none.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Any:
        """Resizes and normalises as in evaluation, then runs the network in fp32."""
        images = preprocess(model_input, self._config)
        with torch.inference_mode():
            return self._network(images).float().softmax(dim=1).numpy()


mlflow.models.set_model(RegisteredNetwork())
