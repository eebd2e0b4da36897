"""The configuration of a spiking neuron; neurons.py builds it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
        "atan", "sigmoid", "piecewise_quadratic", "piecewise_exp", "soft_sign", "super_spike", "erf", "rect"
    ] = Field("atan", description="Surrogate gradient, by SpikingJelly's name (triangle = piecewise_quadratic).")
    alpha: float = Field(2.0, gt=0.0, description="Sharpness of the surrogate gradient.")
    bound: int = Field(4, ge=1, le=255, description="I-LIF: D, the largest integer emitted.")
    leak: float = Field(0.25, ge=0.0, le=1.0, description="I-LIF: fraction of the membrane kept after a step.")
    input_scale: float = Field(1.0, gt=0.0, description="I-LIF: factor on the input; 0.5 with leak 0.5 on Gen1.")

    @model_validator(mode="after")
    def _fields_belong_to_the_kind(self) -> "NeuronConfig":
        fields = type(self).model_fields
        foreign = [
            f"{name}={getattr(self, name)!r}"
            for name in fields
            if name != "kind"
            and (name in _INTEGER_FIELDS) != (self.kind == "ilif")
            and getattr(self, name) != fields[name].default
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
