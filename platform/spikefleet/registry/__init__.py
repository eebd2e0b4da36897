"""The registry of trained networks: register, promote, look up, load, pull.

`from spikefleet import registry` is its public face; the modules below it are its parts.
"""

from spikefleet.registry.api import (
    Promotion,
    RegisteredModel,
    RegisteredVersion,
    best,
    describe,
    list_models,
    load,
    promote,
    pull,
    register,
    renew,
    show,
)

__all__ = [
    "Promotion",
    "RegisteredModel",
    "RegisteredVersion",
    "best",
    "describe",
    "list_models",
    "load",
    "promote",
    "pull",
    "register",
    "renew",
    "show",
]
