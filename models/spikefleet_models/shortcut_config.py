"""The configuration of shortcut back-propagation: where side branches attach, and how they weigh; see shortcut.py."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ShortcutConfig(BaseModel):
    """Side branches and their balance coefficient. `where` switches them on; the rest are the recommended readings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    where: Literal["none", "stage", "block"] = Field(
        "none",
        description="A side branch after each stage or block but the last; none trains without, whatever follows.",
    )
    combine: Literal["add", "convex"] = Field(
        "add", description="The network's own output weighs 1, or what the branches leave of 1."
    )
    loss: Literal["summed_logits", "sum_losses"] = Field(
        "summed_logits", description="Loss of the combined logits, or combination of the losses of each."
    )
    schedule: Literal["constant", "linear", "exp10", "cosine", "poly", "step"] = Field(
        "linear", description="How lambda falls from lambda0; all but constant and step end at 0."
    )
    lambda0: float = Field(0.25, ge=0.0, description="Weight of each branch at the start of training.")
    power: float = Field(0.25, gt=0.0, description="poly: exponent of the part of training that is left.")
    milestones: tuple[float, ...] = Field(
        (), description="step: parts of training, in (0, 1), after which lambda drops."
    )
    gamma: float = Field(0.1, ge=0.0, lt=1.0, description="step: factor on lambda at each milestone.")

    @model_validator(mode="after")
    def _fields_belong_to_the_schedule(self) -> "ShortcutConfig":
        for name, schedule in (("power", "poly"), ("milestones", "step"), ("gamma", "step")):
            if self.schedule != schedule and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)} has no effect with schedule={self.schedule}")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule=step needs milestones, for example milestones=[0.5,0.75]")
        growing = list(self.milestones) == sorted(set(self.milestones))
        if not growing or any(not 0.0 < milestone < 1.0 for milestone in self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be growing parts of training between 0 and 1")
        return self

    @property
    def enabled(self) -> bool:
        """Whether there are side branches."""
        return self.where != "none"

    def check_branches(self, channels: list[int]) -> list[int]:
        """The channels that the side branches see, first to last, as given.

        Raises:
            ValueError: there are none, or `convex` would give the network's own output a negative weight.
        """
        if not channels:
            raise ValueError(
                f"where={self.where}: the network has only one {self.where}, and no branch follows the last"
            )
        if self.combine == "convex" and self.lambda0 * len(channels) > 1.0:
            raise ValueError(
                f"lambda0={self.lambda0} for each of {len(channels)} side branches leaves the network's own output a "
                f"negative weight under combine=convex; give at most {1 / len(channels):.4g}"
            )
        return channels
