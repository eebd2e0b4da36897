"""The sections `evaluation`, `tracking` and `registry`: how a run is measured, logged and registered."""

from __future__ import annotations

from pydantic import Field

from spikefleet.config.messages import PLAIN_NAME
from spikefleet.config.section import Section


class EvaluationConfig(Section):
    """How a split is measured."""

    max_detections: int = Field(
        100,
        gt=10,
        le=10_000,
        description="detection: the best detections of a class in an image that count; COCO's number is 100",
    )


class TrackingConfig(Section):
    """What is logged to MLflow, and how often."""

    experiment: str | None = Field(None, description="MLflow experiment; default: the recipe's name")
    every_steps: int = Field(10, ge=1, description="steps between two logs of step metrics")
    health_every_steps: int = Field(50, ge=1, description="steps between two measurements of firing rates")


class RegistryConfig(Section):
    """Whether and under which name the best checkpoint is registered."""

    register_best: bool = Field(True, description="register the best checkpoint at the end of the run")
    name: str | None = Field(
        None,
        pattern=PLAIN_NAME,
        description="registered model, whatever the data; default: default_name on the data set of the recipe, and "
        "FAMILY_DATASET on another one",
    )
    default_name: str | None = Field(
        None, pattern=PLAIN_NAME, description="registered model on the data set of the recipe; default: recipe"
    )
    dataset: str | None = Field(
        None, pattern=PLAIN_NAME, description="name of the data set that the recipe was written for; null: any"
    )
