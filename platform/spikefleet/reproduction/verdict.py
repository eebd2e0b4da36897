"""What trainings over seeds say about the claims of a paper's table."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from spikefleet.gates.paired import ALPHA, holm
from spikefleet.reproduction.claim import Claim, ComparedRows
from spikefleet.reproduction.paired_seeds import PairedSeeds

Verdict = Literal[
    "holds", "holds in part", "not shown at this scale", "contradicted", "contradicted in part", "not run yet"
]

Found = Literal["shown", "reversed", "open", "not run"]

Results = Mapping[str, Mapping[Hashable, float]]
"""Values by row name and seed, in the unit of the column."""

_Test = tuple[str, frozenset[str]]
"""Column and rows."""


@dataclass(frozen=True)
class JudgedPair:
    """Two rows of a claim, with our results."""

    rows: ComparedRows
    paper: float | None
    """The paper's first - second; None where it has no values."""
    ours: PairedSeeds | None
    """None where the rows have no common seed."""
    adjusted_p: float | None
    """p of the paired t-test, adjusted for all comparisons of the table and of one source (Holm); None without two
    common seeds."""
    found: Found
    """shown: the difference has the claimed sign, and the adjusted p is at most 5 %. reversed: the opposite sign, and
    as clear. open: neither. not run: fewer than two common seeds."""


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with the verdict on it."""

    claim: Claim
    pairs: tuple[JudgedPair, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict, by the pairs of rows that were run: those with two common seeds or more.

        * not run yet: no pair was run.
        * holds: every pair of the claim was run, and is shown.
        * contradicted: every pair of the claim was run, and is reversed.
        * contradicted in part: a pair is reversed, and none is shown; the others are open or not run.
        * holds in part: a pair is shown, but not all: the others are open, reversed or not run.
        * not shown at this scale: pairs were run, but none is shown or reversed. An effect may be there that is smaller
          than these seeds can show.

        A pair is shown, or reversed, by its p adjusted over all pairs of all claims of the table (Holm), at most 5 %;
        pairs that were not run count with p = 1. Claims of the paper and of this project are adjusted apart.
        """
        found = [pair.found for pair in self.pairs]
        if all(one == "not run" for one in found):
            return "not run yet"
        if all(one == "shown" for one in found):
            return "holds"
        if "shown" in found:
            return "holds in part"
        if all(one == "reversed" for one in found):
            return "contradicted"
        return "contradicted in part" if "reversed" in found else "not shown at this scale"


def judge(
    claims: Sequence[Claim], results: Mapping[str, Results], papers: Mapping[tuple[str, str], float | None]
) -> tuple[JudgedClaim, ...]:
    """Judges all claims of a table on results of one scale.

    Args:
        claims: of the table.
        results: by column, the values of each row by seed, or by whatever must be equal in a pair.
        papers: the paper's first - second, by the name of the claim and where its pair is (`at`).

    Returns:
        The claims in their order.
    """
    pairs = [(claim, rows) for claim in claims for rows in claim.pairs]
    paired = [_paired(results.get(claim.column, {}), rows) for claim, rows in pairs]
    # A pair that two claims share is one test, and counts once. One that was not run counts too, with p = 1: else what
    # is run first would be judged by fewer tests than the table has.
    tests: dict[str, dict[_Test, float]] = {}
    for (claim, rows), ours in zip(pairs, paired, strict=True):
        p_value = ours.p_value if ours is not None and ours.seeds > 1 else 1.0
        tests.setdefault(claim.source, {})[_test(claim, rows)] = p_value
    adjusted = {
        (source, test): p
        for source, of_source in tests.items()
        for test, p in zip(of_source, holm(list(of_source.values())), strict=True)
    }
    judged = {
        (claim.name, rows.at): JudgedPair(
            rows,
            papers.get((claim.name, rows.at)),
            ours,
            p := adjusted[claim.source, _test(claim, rows)] if ours is not None and ours.seeds > 1 else None,
            _found(claim, ours, p),
        )
        for (claim, rows), ours in zip(pairs, paired, strict=True)
    }
    return tuple(JudgedClaim(claim, tuple(judged[claim.name, rows.at] for rows in claim.pairs)) for claim in claims)


def _paired(results: Results, rows: ComparedRows) -> PairedSeeds | None:
    return PairedSeeds.of(results.get(rows.first, {}), results.get(rows.second, {}))


def _test(claim: Claim, rows: ComparedRows) -> _Test:
    return claim.column, frozenset({rows.first, rows.second})


def _found(claim: Claim, ours: PairedSeeds | None, adjusted_p: float | None) -> Found:
    if ours is None or adjusted_p is None:
        return "not run"
    if adjusted_p > ALPHA:
        return "open"
    return "shown" if ours.difference * claim.sign > 0 else "reversed"
