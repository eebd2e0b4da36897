"""How a candidate is judged against the champion, and how a model is retrained."""

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from spikefleet.config.messages import PLAIN_NAME
from spikefleet.config.section import Section


class RetrainConfig(Section):
    """The gates between a candidate and the alias `champion`; none of it changes the result of a training."""

    gate_store: str | None = Field(
        None,
        description="store with images on which candidate and champion are compared, as `spikefleet data split STORE "
        "--gate 0.1` makes it: a path, a URI or a name in --stores-dir; null: promotion by the plain validation metric",
    )
    gate_split: str = Field("gate", pattern=PLAIN_NAME, description="its split with these images")
    seeds: int = Field(
        1, ge=1, le=1_000, description="trainings of a retraining, with seeds from train.seed on; the best is judged"
    )
    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="chance that a network that is no better becomes champion, per comparison"
    )
    margin: float = Field(
        0.002, ge=0, lt=1, description="least gain in accuracy, or in mAP, with which a candidate becomes champion"
    )
    class_drop: float = Field(
        0.05, gt=0, le=1, description="largest drop of a class in accuracy, or in its AP, if more than chance"
    )
    energy_slack: float = Field(0.1, ge=0, description="the candidate's energy may exceed the champion's by this share")
    guard: bool = Field(
        False,
        description="divide alpha by the number of comparisons on the same gate images, which their use wears out",
    )
    resamples: int = Field(2_000, ge=200, le=1_000_000, description="detection: resamples of the bootstrap of mAP")

    @field_validator("gate_store")
    @classmethod
    def _no_credentials(cls, store: str | None) -> str | None:
        if store is not None and not store.strip():
            raise ValueError("it is empty; name a store, or set null for none")
        # The config is logged and part of every registered model.
        if store is not None and "://" in store and "@" in urlsplit(store).netloc:
            raise ValueError("the URI contains credentials, which would be logged; set them in the environment instead")
        return store
