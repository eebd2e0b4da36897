"""What is asked of the registry, and which versions answer it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from spikefleet.certificates.verdict import NOT_SPIKING, PROVED
from spikefleet.errors import UserError
from spikefleet.registry.flaws import FLAW
from spikefleet.registry.promotion import Mode
from spikefleet.registry.query import parse_where
from spikefleet.registry.version import CHAMPION, SPIKE_DRIVEN, RegisteredVersion

TRUSTED: Final = (PROVED, NOT_SPIKING)
"""Verdicts of the spike check that a version has which is found without `any_proof`."""


@dataclass(frozen=True)
class Question:
    """What is asked of the registry. Raises UserError for a condition that is none."""

    task: str
    metric: str
    """Full name, or the name of a validation metric without its split."""
    dataset: str | None = None
    where: str | None = None
    mode: Mode = "max"
    top: int = 1
    """How many versions, at most."""
    any_proof: bool = False
    """Also versions whose spike-driven form is not proved."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"top={self.top} must be at least 1")
        if self.where is not None:
            parse_where(self.where)  # its syntax, before the first request

    def narrowed(self) -> dict[str, str]:
        """The tags that a version must have."""
        return {"task": self.task} | ({} if self.dataset is None else {"dataset": self.dataset})

    def trusts(self, version: RegisteredVersion) -> bool:
        """Whether the spike check of a version is good enough."""
        return self.any_proof or version.tags.get(SPIKE_DRIVEN) in TRUSTED

    def takes(self, version: RegisteredVersion) -> bool:
        """Whether a version is looked at: one of the task and data set, without a flaw, that is trusted."""
        tags = version.tags
        return (
            all(tags.get(key) == wanted for key, wanted in self.narrowed().items())
            and FLAW not in tags
            and self.trusts(version)
        )

    def value(self, version: RegisteredVersion) -> float | None:
        """The metric of a version; None if it was not measured or is no number."""
        value = version.metric(self.metric)
        return None if value is None or math.isnan(value) else value

    def loss(self, value: float) -> float:
        """A value of the metric as a number that is the smaller, the better it is."""
        return -value if self.mode == "max" else value

    def order(self, version: RegisteredVersion) -> tuple[float, bool, float, str, int]:
        """What versions with the metric are sorted by: of equal ones a champion is first, then the oldest."""
        value = self.value(version)
        assert value is not None, f"{version.uri} has no {self.metric}"
        fresh = CHAMPION not in version.aliases
        return self.loss(value), fresh, version.created.timestamp(), version.name, version.version
