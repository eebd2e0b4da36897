"""The configuration of a spiking neuron; neurons.py builds it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

DEFAULT_ALPHA = {
    "atan": 2.0,
    "sigmoid": 4.0,
    "piecewise_quadratic": 1.0,
    "piecewise_exp": 1.0,
    "soft_sign": 2.0,
    "super_spike": 1.0,
    "erf": 2.0,
    "rect": 1.0,
    "dspike": 3.0,
}
"""Surrogate gradient -> `alpha` where none is given: SpikingJelly's default; for dspike, that of its authors' code."""

_INTEGER_FIELDS = frozenset({"bound", "leak", "input_scale"})


class NeuronConfig(BaseModel):
    """One kind of spiking neuron; the defaults are the SG ResNet paper's on static images and SpikeYOLO's on COCO."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["if", "lif", "plif", "ilif"] = Field(
        "if", description="IF, LIF, PLIF (one learned tau per layer), or I-LIF (integers up to `bound`)."
    )
    tau: float = Field(
        2.0, gt=1.0, description="Membrane time constant in steps; initial value for PLIF; unused by IF."
    )
    decay_input: bool = Field(True, description="LIF and PLIF: also divide the input by tau.")
    v_threshold: float = Field(1.0, gt=0.0, description="Firing threshold V_th.")
    v_reset: float | None = Field(0.0, description="Voltage after a spike; null subtracts V_th (soft reset).")
    detach_reset: bool = Field(True, description="Detach the reset from the gradient.")
    surrogate: Literal[
        "atan", "sigmoid", "piecewise_quadratic", "piecewise_exp", "soft_sign", "super_spike", "erf", "rect", "dspike"
    ] = Field(
        "atan",
        description="Surrogate gradient by SpikingJelly's name (triangle = piecewise_quadratic); dspike = tanh on a "
        "window of width 1.",
    )
    alpha: float = Field(
        None, gt=0.0, validate_default=True, description="Sharpness of the surrogate gradient; null: its own default."
    )
    bound: int = Field(4, ge=1, le=255, description="I-LIF: D, the largest integer emitted.")
    leak: float = Field(0.25, ge=0.0, le=1.0, description="I-LIF: fraction of the membrane kept after a step.")
    input_scale: float = Field(1.0, gt=0.0, description="I-LIF: factor on the input; 0.5 with leak 0.5 on Gen1.")

    @field_validator("alpha", mode="before")
    @classmethod
    def _alpha_of_the_surrogate(cls, alpha: Any, info: ValidationInfo) -> Any:
        # A stored configuration holds the number, so that it does not depend on this version's default.
        return DEFAULT_ALPHA.get(info.data.get("surrogate", ""), 1.0) if alpha is None else alpha

    @model_validator(mode="after")
    def _fields_belong_to_the_kind(self) -> "NeuronConfig":
        fields = type(self).model_fields
        defaults = {name: field.default for name, field in fields.items()} | {"alpha": DEFAULT_ALPHA[self.surrogate]}
        foreign = [
            f"{name}={getattr(self, name)!r}"
            for name in fields
            if name != "kind"
            and (name in _INTEGER_FIELDS) != (self.kind == "ilif")
            and getattr(self, name) != defaults[name]
        ]
        if foreign:
            allowed = _INTEGER_FIELDS if self.kind == "ilif" else fields.keys() - _INTEGER_FIELDS - {"kind"}
            raise ValueError(
                f"kind={self.kind!r} does not use {', '.join(foreign)}; set only {', '.join(sorted(allowed))}, or "
                "change kind"
            )
        return self

    def tags(self) -> dict[str, object]:
        """Registry tags: `neuron`, the kind, and `bound` for neurons that emit integers."""
        return {"neuron": self.kind, "bound": self.bound} if self.kind == "ilif" else {"neuron": self.kind}
