"""The section `init`: the trained network that a training starts from.

The field is named `from`, a word of Python, so the class is made by a call; `source` reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, create_model

from spikefleet.config.section import Section


class _Init(Section):
    @property
    def source(self) -> str | None:
        """The field `from`."""
        return getattr(self, "from", None)


if TYPE_CHECKING:

    class InitConfig(_Init):
        """Where the initial weights are from."""

else:
    InitConfig = create_model(
        "InitConfig",
        __base__=_Init,
        __module__=__name__,
        __doc__="Where the initial weights are from.",
        **{
            "from": (
                str | None,
                Field(
                    None,
                    min_length=1,
                    description="weights to start from: models:/NAME@champion, models:/NAME/3, a run, or a "
                    ".safetensors "
                    "file; their hash becomes train.initial_weights, which is part of the run's identity",
                ),
            )
        },
    )


def matches(name: str, prefix: str) -> bool:
    """Whether a parameter or a module is that of a prefix, or inside it: `stages.0` has `stages.0.conv.weight`."""
    return name == prefix or name.startswith(f"{prefix}.")
