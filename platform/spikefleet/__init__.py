"""spikefleet: distributed training of spiking neural networks for vision.

`import spikefleet as sf` imports neither torch nor ray: each name is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spikefleet import registry
    from spikefleet.api import Model, Run, load, search, train
    from spikefleet.errors import RunError, UserError

__version__ = "0.1.0"

_WHERE = {
    "Model": "api",
    "Run": "api",
    "RunError": "errors",
    "UserError": "errors",
    "load": "api",
    "search": "api",
    "train": "api",
}

__all__ = ["Model", "Run", "RunError", "UserError", "load", "registry", "search", "train"]


def __getattr__(name: str) -> object:
    if name == "registry":
        return import_module("spikefleet.registry")
    if name in _WHERE:
        return getattr(import_module(f"spikefleet.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
