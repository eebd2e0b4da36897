"""The rule that decides which version of a registered model gets the alias `champion`."""

from dataclasses import dataclass
from math import isnan
from typing import Literal

from spikefleet.certificates.verdict import NOT_SHOWN, NOT_SPIKING, PROVED, REFUTED

Mode = Literal["max", "min"]
Alias = Literal["champion", "challenger"]


_WITHHELD = {
    REFUTED: "the binary form of version {} differs from it, or it has none; see its spike_check.json",
    NOT_SHOWN: "the spike check of version {} shows nothing, since no two images have different outputs; see its "
    "spike_check.json",
}
"""Why a version with such a verdict is never champion."""


@dataclass(frozen=True)
class Candidate:
    """A version and the value of its deciding metric."""

    version: int
    value: float | None
    """None if it was not measured."""
    data: str | None = None
    """Content hash of the data on which the value was measured."""
    verdict: str | None = None
    """Of the spike check; None for versions without one."""
    flaw: str | None = None
    """Why it must not be used, in words; None if nothing speaks against it."""
    rolled_back: str | None = None
    """Why it is champion no more, in words; None if it was not rolled back."""


@dataclass(frozen=True)
class Decision:
    """The alias that a candidate gets, and why."""

    alias: Alias | None
    """None for a version with a flaw, or of which nothing is shown."""
    reason: str


def barred(candidate: Candidate) -> Decision | None:
    """The decision on a candidate that cannot become champion, whatever its metric; None if it can."""
    version, verdict = candidate.version, candidate.verdict
    if candidate.flaw is not None:
        return Decision(None, f"version {version} must not be used: {candidate.flaw}")
    if verdict in _WITHHELD:
        return Decision(None if verdict == NOT_SHOWN else "challenger", _WITHHELD[verdict].format(version))
    if verdict not in (PROVED, NOT_SPIKING):
        what = (
            "without a verdict of the spike check" if verdict is None else f"with an unknown verdict {verdict[:40]!r}"
        )
        return Decision(
            "challenger",
            f"version {version} was registered {what} (tag spike_driven), so it cannot become champion; register it "
            "from its run",
        )
    if candidate.rolled_back is not None:
        return Decision(
            "challenger",
            f"version {version} was rolled back: {candidate.rolled_back}; `spikefleet registry rollback MODEL --to "
            f"{version}` makes it champion again",
        )
    return None


def decide(champion: Candidate | None, candidate: Candidate, metric: str, mode: Mode) -> Decision:
    """Decides the alias of a candidate: it replaces the champion only with a better value on the same data.

    Args:
        champion: the current champion; None for the first version.
        candidate: the version to decide on.
        metric: name of the metric, for the reason.
        mode: `max` or `min`.
    """
    if champion is not None and champion.version == candidate.version:
        return Decision("champion", f"version {candidate.version} is already the champion")
    if (refusal := barred(candidate)) is not None:
        return refusal
    if candidate.value is None or isnan(candidate.value):
        return Decision("challenger", f"version {candidate.version} has no {metric} to compare")
    if mode == "max" and candidate.value == 0:
        return Decision(None, f"version {candidate.version} must not be used: its {metric} is 0")
    if champion is None:
        return Decision("champion", f"version {candidate.version} is the first, with {metric} {candidate.value:.6g}")
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
