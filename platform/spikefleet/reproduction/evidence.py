"""What recorded trainings say about the papers' claims: results and verdicts by table and scale."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spikefleet.reproduction.claim import Claim, entry_of, load_claims, paper_difference
from spikefleet.reproduction.plan import config_of
from spikefleet.reproduction.results import SUFFIX, Training, read_results, setting_of
from spikefleet.reproduction.rows import value_of
from spikefleet.reproduction.scales import Scale
from spikefleet.reproduction.table import Entry, PaperTable, list_tables, load_table
from spikefleet.reproduction.verdict import JudgedClaim, judge


@dataclass(frozen=True)
class TableEvidence:
    """The claims of one table on the recorded trainings of one scale."""

    table: PaperTable
    scale: Scale
    claims: tuple[JudgedClaim, ...]
    trainings: Mapping[str, tuple[Training, ...]]
    """Of each row that the claims speak of, by its name, in the order of seeds."""
    others: Mapping[str, tuple[Training, ...]]
    """Of the other rows that can be run at this scale, by their full names."""

    @property
    def distinct(self) -> dict[str, Training]:
        """The trainings by digest; one that several rows have in common counts once."""
        return {one.digest: one for rows in (*self.trainings.values(), *self.others.values()) for one in rows}

    @property
    def untrained(self) -> list[str]:
        """Names of the rows that could be run at this scale, and have no training."""
        return [name for rows in (self.trainings, self.others) for name, trained in rows.items() if not trained]

    @property
    def was_run(self) -> bool:
        """Whether any two rows of a claim have trainings of the same seed."""
        return any(pair.ours is not None for one in self.claims for pair in one.pairs)


def collect_evidence(results: Path) -> list[TableEvidence]:
    """Reads recorded results, and judges the claims of all tables on them.

    Args:
        results: directory of files that `reproduce` recorded.

    Returns:
        One for each table with claims and each of its scales, run or not, in the order of names.

    Raises:
        UserError: a file is damaged.
    """
    files: dict[Path, dict[str, list[Training]]] = {}
    found = []
    for name in list_tables():
        table = load_table(name)
        if claims := load_claims(table):
            found += [_judged(table, scale, claims, results, files) for scale in table.scales]
    return found


def _judged(
    table: PaperTable,
    scale: Scale,
    claims: Sequence[Claim],
    results: Path,
    files: dict[Path, dict[str, list[Training]]],
) -> TableEvidence:
    names = dict.fromkeys(name for claim in claims for pair in claim.pairs for name in (pair.first, pair.second))
    trainings = {name: _trainings(entry_of(table, name), scale, results, files) for name in names}
    columns = dict.fromkeys(claim.column for claim in claims)
    values = {key: {name: _values(table, key, trainings[name]) for name in names} for key in columns}
    papers = {(claim.name, pair.at): paper_difference(claim, pair, table) for claim in claims for pair in claim.pairs}
    others = {
        entry.full_name: _trainings(entry, scale, results, files)
        for entry in table.entries()
        if not {entry.row.name, entry.full_name} & set(names) and entry.group.refusal(entry.row, scale) is None
    }
    return TableEvidence(table, scale, judge(claims, values, papers), trainings, others)


def _trainings(
    entry: Entry, scale: Scale, results: Path, files: dict[Path, dict[str, list[Training]]]
) -> tuple[Training, ...]:
    if entry.group.refusal(entry.row, scale) is not None:
        return ()
    recipe = entry.group.scales[scale].recipe
    path = results / f"paper-{scale}-{recipe}{SUFFIX}"
    if path not in files:
        files[path] = {}
        for training in read_results(path).values():
            files[path].setdefault(training.setting, []).append(training)
    if not files[path]:  # resolving a configuration takes longer than finding that there is nothing
        return ()
    setting = setting_of(config_of(recipe, entry.group.overrides(entry.row, scale)))
    return tuple(sorted(files[path].get(setting, ()), key=lambda training: training.seed))


def _values(table: PaperTable, key: str, trainings: Sequence[Training]) -> dict[Hashable, float]:
    """Values by seed and data: on other data, a seed is no pair."""
    found = {(one.seed, one.data_hash): value_of(table, key, one) for one in trainings}
    return {pair: value * table.columns[key].factor for pair, value in found.items() if value is not None}
