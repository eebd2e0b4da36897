"""The registry of trained networks: register, promote, search, load, pull.

`from spikefleet import registry` is the public API.
"""

from spikefleet.registry.api import (
    Promotion,
    RegisteredModel,
    RegisteredVersion,
    best,
    describe,
    keep_as_challenger,
    list_models,
    load,
    promote,
    pull,
    refused_alias,
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
    "keep_as_challenger",
    "list_models",
    "load",
    "promote",
    "pull",
    "refused_alias",
    "register",
    "renew",
    "show",
]
