"""The plain data of a checkpoint: position, best checkpoint so far, history; checked by type when it is read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spikefleet.errors import UserError


class BestCheckpoint(BaseModel):
    """The best checkpoint so far."""

    model_config = ConfigDict(strict=True)

    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    metrics: dict[str, float]


class WorldSize(BaseModel):
    """From which step on how many workers trained."""

    model_config = ConfigDict(strict=True)

    from_step: int = Field(ge=0)
    workers: int = Field(ge=1)


class CheckpointState(BaseModel):
    """The content of `state.json`."""

    model_config = ConfigDict(strict=True)

    epoch: int = Field(ge=0)
    step_in_epoch: int = Field(ge=0)
    steps_per_epoch: int = Field(ge=1)
    world_size: int = Field(ge=1)
    data_hash: str
    best: BestCheckpoint | None
    history: list[dict[str, float]]
    sums: dict[str, float]
    scaler: dict[str, float | int | None]
    threads: list[int] | None = None
    kernels: Literal["native", "lean"] | None = "lean"
    """The form of the spiking units on a CPU, the lean one in checkpoints without the field; None on a GPU."""
    weight_gradients: Literal["torch", "bf16", "fp32"] = "torch"
    """How convolutions on a CPU compute their weight gradients; as torch does in checkpoints without the field."""
    averaged: int = Field(0, ge=0)
    world_sizes: list[WorldSize] | None = None
    """The world sizes of all steps so far; None in checkpoints without the field, which had one."""
    seconds: float = Field(0.0, ge=0)
    """Of training so far, with `train.max_minutes`."""
    longest_epoch: float = Field(0.0, ge=0)
    """Seconds of the longest epoch, with `train.max_minutes`."""

    @classmethod
    def of(cls, state: Mapping[str, Any] | Any, checkpoint: Path | str) -> CheckpointState:
        """Checks plain data.

        Args:
            state: as read from JSON.
            checkpoint: that it is from, for messages.

        Raises:
            UserError: a field is missing or of another type.
        """
        try:
            return cls.model_validate(state)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the whole"
            raise UserError(
                f"checkpoint {checkpoint} is damaged: {field} of its state.json: {first['msg']}; remove it to resume "
                "from the checkpoint before it"
            ) from None
