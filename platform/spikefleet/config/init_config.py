"""The section `init`: the trained network that a training starts from.

The field is named `from`, a word of Python, so the class is made by a call; `source` reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, create_model, model_validator

from spikefleet.config.section import Section


class _Init(Section):
    scale_thresholds: float | None = Field(
        None,
        gt=0,
        le=100,
        description="scale the batch norms before neurons to their thresholds: from an ANN twin by this percentile of "
        "its activations, such as 99.9; from a spiking network by the ratio of D; null: weights as they are",
    )
    batches: int = Field(
        8, ge=1, le=10_000, description="training batches on which scale_thresholds measures activations and statistics"
    )

    @property
    def source(self) -> str | None:
        """The field `from`."""
        return getattr(self, "from", None)

    @model_validator(mode="after")
    def _scaled_is_something(self) -> Self:
        if self.scale_thresholds is not None and self.source is None:
            raise ValueError("scale_thresholds has no effect without init.from; set it, or leave scale_thresholds out")
        return self


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
