"""The optimizer and the schedule of its learning rate."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from spikefleet.config.section import Section


class OptimConfig(Section):
    """SGD with momentum, or AdamW; the learning rate is a pure function of the step."""

    kind: Literal["sgd", "adamw"] = Field("sgd", description="optimizer: SGD with momentum, or AdamW")
    lr: float = Field(gt=0, description="learning rate after warm-up")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD; of AdamW: the first of its betas")
    beta2: float = Field(0.999, ge=0, lt=1, description="adamw: decay of the mean of squared gradients")
    nesterov: bool = Field(False, description="sgd: Nesterov momentum")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="sgd: L2 penalty; adamw: decoupled, per step and learning rate",
    )
    decay_norm_and_bias: bool = Field(True, description="apply weight decay to batch-norm and bias parameters too")
    decay_gates: bool = Field(
        False, description="apply weight decay to W and B of BSG* too, which by itself closes the gates"
    )
    fused: bool = Field(
        False,
        description="one kernel updates all weights; on a GPU steps are then not waited for. The last bits differ",
    )
    schedule: Literal["constant", "step", "cosine", "linear"] = Field("cosine", description="learning-rate schedule")
    milestones: tuple[int, ...] = Field((), description="step: epochs at which the rate is multiplied by gamma")
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor at each milestone")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear warm-up from zero")
    warmup_bias_lr: float | None = Field(None, ge=0, description="initial rate of biases in warm-up; default: 0")
    warmup_momentum: float | None = Field(
        None, ge=0, lt=1, description="initial momentum in warm-up; default: momentum"
    )
    final_factor: float = Field(0.0, ge=0, le=1, description="cosine, linear: final learning rate / lr")
    lr_factors: dict[str, PositiveFloat] = Field(
        {}, description="factors of the learning rate by names of modules, such as {stem: 0.1}; the longest name counts"
    )

    @model_validator(mode="after")
    def _fields_belong_to_the_kind(self) -> Self:
        if self.kind == "adamw" and self.nesterov:
            raise ValueError("nesterov=true has no effect with kind=adamw; set nesterov=false")
        if self.kind == "sgd" and self.beta2 != OptimConfig.model_fields["beta2"].default:
            raise ValueError(f"beta2={self.beta2} has no effect with kind=sgd; set kind=adamw")
        return self

    @model_validator(mode="after")
    def _warm_up_is_there(self) -> Self:
        for name in ("warmup_bias_lr", "warmup_momentum"):
            if getattr(self, name) is not None and not self.warmup_epochs:
                raise ValueError(f"{name}={getattr(self, name)} has no effect without warmup_epochs; set it")
        return self

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> Self:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule=step needs milestones; set, for example, optim.milestones=[100,150]")
        if self.schedule != "step" and self.milestones:
            raise ValueError(
                f"milestones={list(self.milestones)} have no effect with schedule={self.schedule}; set schedule=step"
            )
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be increasing epochs, the first at least 1")
        return self
