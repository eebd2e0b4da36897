"""Names of models -> configurations -> networks.

Each name is one published network (README.md says how to add one); everything else about it is an override:
`model_config("sg_resnet18", num_classes=100, timesteps=2)`.
"""

import difflib
import fnmatch
from typing import Any

from spikefleet_models.sg_resnet import SGResNet, SGResNetConfig

ModelConfig = SGResNetConfig

_R10: dict[str, Any] = {"stages": (1, 1, 1, 1)}
_R18: dict[str, Any] = {"stages": (2, 2, 2, 2)}
_R34: dict[str, Any] = {"stages": (3, 4, 6, 3)}
_R50: dict[str, Any] = {"stages": (3, 4, 6, 3), "block": "bottleneck"}
_SEW: dict[str, Any] = {"connection": "add", "decoder": "rate"}
_SPIKING: dict[str, Any] = {"connection": "post_add", "decoder": "rate"}
_ANN: dict[str, Any] = {"connection": "ann", "decoder": "rate", "timesteps": 1}

_PRESETS: dict[str, dict[str, Any]] = {
    # Zhang et al. 2023. R50 decodes by rate there; the others by ASD.
    "sg_resnet10": _R10,
    "sg_resnet18": _R18,
    "sg_resnet34": _R34,
    "sg_resnet50": {**_R50, "decoder": "rate"},
    # For 8x8 pictures: seconds to train on a laptop.
    "sg_resnet_tiny": {"stages": (1, 1, 1), "width": 0.5, "in_channels": 1},
    # Fang et al. 2021, ADD.
    "sew_resnet18": {**_R18, **_SEW},
    "sew_resnet34": {**_R34, **_SEW},
    "sew_resnet50": {**_R50, **_SEW},
    # Post-addition baselines.
    "spiking_resnet18": {**_R18, **_SPIKING},
    "spiking_resnet34": {**_R34, **_SPIKING},
    # ANN twins.
    "resnet18": {**_R18, **_ANN},
    "resnet34": {**_R34, **_ANN},
    "resnet50": {**_R50, **_ANN},
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that match an fnmatch pattern, in the order of the table."""
    return [name for name in _PRESETS if fnmatch.fnmatchcase(name, pattern)]


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a named model with fields overridden.

    Raises:
        ValueError: unknown name (the sentence names the nearest), unknown field or bad value.
    """
    if name not in _PRESETS:
        nearest = difflib.get_close_matches(name, _PRESETS, n=3) or list(_PRESETS)
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(nearest)}?")
    return ModelConfig(**{**_PRESETS[name], **overrides})


def build_model(config: ModelConfig) -> SGResNet:
    """The network of a configuration, freshly initialised from torch's global generator."""
    return SGResNet(config)
