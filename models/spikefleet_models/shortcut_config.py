"""The configuration of shortcut back-propagation: where side branches attach and their weights; see shortcut.py."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ShortcutConfig(BaseModel):
    """Side branches and their balance coefficient; `where` enables them.

    The other defaults are what helped most at 34 layers. The paper's are `loss=summed_logits`, with `constant` and 1,
    or with `linear` from 0.25.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    where: Literal["none", "stage", "block"] = Field(
        "none",
        description="A side branch after each stage or block except the last; none disables them.",
    )
    combine: Literal["add", "convex"] = Field(
        "add", description="Weight of the network's own output: 1 (add), or 1 minus those of the branches (convex)."
    )
    loss: Literal["summed_logits", "sum_losses", "own_and_summed", "own_and_summed_detached"] = Field(
        "sum_losses",
        description="Loss of the combined logits (the paper's); combination of the individual losses; or the network's "
        "own loss plus lambda times that of its own logits (detached: constant there) and the branches' together.",
    )
    schedule: Literal["constant", "linear", "exp10", "cosine", "poly", "step"] = Field(
        "constant", description="Decay of lambda from lambda0; all but constant and step end at 0."
    )
    lambda0: float = Field(1.0, ge=0.0, description="Weight of each branch at the start of training.")
    power: float = Field(0.25, gt=0.0, description="poly: exponent of the remaining fraction of training.")
    milestones: tuple[float, ...] = Field(
        (), description="step: fractions of training, in (0, 1), after which lambda drops."
    )
    gamma: float = Field(0.1, ge=0.0, lt=1.0, description="step: factor on lambda at each milestone.")

    @model_validator(mode="after")
    def _fields_belong_to_the_schedule(self) -> "ShortcutConfig":
        for name, schedule in (("power", "poly"), ("milestones", "step"), ("gamma", "step")):
            if self.schedule != schedule and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with schedule={self.schedule}; remove it or set "
                    f"schedule={schedule}"
                )
        if self.combine == "convex" and self.loss.startswith("own_and_summed"):
            raise ValueError(f"loss={self.loss} is defined for combine=add only; set combine=add or another loss")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule=step needs milestones; set for example milestones=[0.5,0.75]")
        growing = list(self.milestones) == sorted(set(self.milestones))
        if not growing or any(not 0.0 < milestone < 1.0 for milestone in self.milestones):
            raise ValueError(
                f"milestones={list(self.milestones)} must be increasing fractions of training between 0 and 1"
            )
        return self

    @property
    def enabled(self) -> bool:
        """Whether there are side branches."""
        return self.where != "none"

    def check_branches(self, channels: list[int]) -> list[int]:
        """Check the input channels of the side branches, first to last, and return them unchanged.

        Raises:
            ValueError: there are no branches, or `convex` would give the network's own output a negative weight.
        """
        if not channels:
            raise ValueError(
                f"where={self.where}: the network has only one {self.where}, and the last one has no branch; "
                "set where=none"
            )
        if self.combine == "convex" and self.lambda0 * len(channels) > 1.0:
            raise ValueError(
                f"lambda0={self.lambda0} for each of {len(channels)} side branches leaves the network's own output a "
                f"negative weight with combine=convex; set at most {1 / len(channels):.4g}"
            )
        return channels
