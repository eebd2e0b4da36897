"""Which version of a registered model deserves the alias `champion`."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from typing import Literal

Mode = Literal["max", "min"]
Alias = Literal["champion", "challenger"]


@dataclass(frozen=True)
class Candidate:
    """A version and its value of the metric that decides; None if it has not been measured."""

    version: int
    value: float | None
    data: str | None = None
    """Hash of the data that the value was measured on."""
    refuted: bool = False
    """Its binary form was shown to differ from the network that was trained."""


@dataclass(frozen=True)
class Decision:
    """The alias that a candidate gets, and why."""

    alias: Alias
    reason: str


def decide(champion: Candidate | None, candidate: Candidate, metric: str, mode: Mode) -> Decision:
    """A candidate replaces the champion only if its value is better; the first version has nobody to beat."""
    if champion is not None and champion.version == candidate.version:
        return Decision("champion", f"version {candidate.version} is the champion already")
    if candidate.refuted:
        return Decision(
            "challenger", f"the binary form of version {candidate.version} differs from it, see its spike_check.json"
        )
    if candidate.value is None or isnan(candidate.value):
        return Decision("challenger", f"version {candidate.version} has no {metric} that could be compared")
    if champion is None:
        return Decision(
            "champion", f"version {candidate.version} is the first one, with {metric} {candidate.value:.6g}"
        )
    if champion.value is None or isnan(champion.value):
        return Decision("challenger", f"champion version {champion.version} has no {metric} to compare with")
    if champion.data != candidate.data:
        return Decision("challenger", f"champion version {champion.version} was measured on other data")
    better = candidate.value > champion.value if mode == "max" else candidate.value < champion.value
    compared = (
        f"{metric} {candidate.value:.6g} of version {candidate.version} is {'' if better else 'not '}better than "
        f"{champion.value:.6g} of champion version {champion.version} ({mode})"
    )
    return Decision("champion" if better else "challenger", compared)


def winner_of(champion: Candidate | None, candidates: Iterable[Candidate], metric: str, mode: Mode) -> Candidate | None:
    """The champion after all candidates have been decided on, in the order of their versions."""
    for candidate in sorted(candidates, key=lambda candidate: candidate.version):
        if decide(champion, candidate, metric, mode).alias == "champion":
            champion = candidate
    return champion
