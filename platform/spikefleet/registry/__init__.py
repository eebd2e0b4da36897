"""The registry of trained networks: register, promote, search, load, pull.

`from spikefleet import registry` is the public API. Each name is imported on first use: a served version imports parts
of this package that need no registry.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spikefleet.registry.api import (
        Change,
        History,
        Promotion,
        RegisteredModel,
        RegisteredVersion,
        Reindexed,
        best,
        card_text,
        describe,
        keep_as_challenger,
        list_models,
        load,
        promote,
        pull,
        ranked,
        read_history,
        refused_alias,
        register,
        reindex,
        renew,
        rollback,
        settle,
        show,
    )

__all__ = [
    "Change",
    "History",
    "Promotion",
    "RegisteredModel",
    "RegisteredVersion",
    "Reindexed",
    "best",
    "card_text",
    "describe",
    "keep_as_challenger",
    "list_models",
    "load",
    "promote",
    "pull",
    "ranked",
    "read_history",
    "refused_alias",
    "register",
    "reindex",
    "renew",
    "rollback",
    "settle",
    "show",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("spikefleet.registry.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
