"""The base of a configuration's sections."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section of a configuration that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
