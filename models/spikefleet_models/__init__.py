"""Networks, neurons, losses, deployment and energy of spiking vision.

Importing the package imports neither torch nor pydantic: the names below are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spikefleet_models.families import (
        AnyModelConfig,
        build_model,
        find_family,
        list_models,
        model_config,
        register_family,
        unregister_family,
    )
    from spikefleet_models.family import ModelConfig

_MODULES = {
    "AnyModelConfig": "families",
    "ModelConfig": "family",
    "build_model": "families",
    "find_family": "families",
    "list_models": "families",
    "model_config": "families",
    "register_family": "families",
    "unregister_family": "families",
}

__all__ = [
    "AnyModelConfig",
    "ModelConfig",
    "build_model",
    "find_family",
    "list_models",
    "model_config",
    "register_family",
    "unregister_family",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
