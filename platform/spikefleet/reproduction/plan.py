"""What to reproduce: the trainings of a table's rows at one scale."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikefleet.config.recipes import load_config
from spikefleet.config.schema import Config
from spikefleet.reproduction.scales import Scale
from spikefleet.reproduction.table import Entry, PaperTable
from spikefleet.search.trial import chooses_data


@dataclass(frozen=True)
class ReproductionPlan:
    """What to reproduce."""

    table: PaperTable
    scale: Scale
    seeds: int = 3
    only: str = "*"
    """fnmatch pattern of rows, by name or "GROUP: NAME"."""
    overrides: Mapping[str, Any] | None = None
    """Dotted overrides of every row."""
    resources: Mapping[str, float] | None = None
    """Fields of Resources that replace those of the table."""
    retry_failed: bool = False
    """Run each failed training once more."""
    train: bool = True
    """False reads existing trainings only."""
    results: Path | None = None
    """Directory of recorded results: their trainings are not run again, and new ones are added."""

    @property
    def data(self) -> dict[str, Any]:
        """Overrides that select other data; they are the same in all trainings of a search, which share one store."""
        return {key: value for key, value in (self.overrides or {}).items() if chooses_data(key)}

    def data_of(self, entry: Entry) -> dict[str, Any]:
        """`data` with what selects the data of the scale."""
        scale = entry.group.scales[self.scale].overrides
        return {**{key: value for key, value in scale.items() if chooses_data(key)}, **self.data}

    def point(self, entry: Entry, seed: int) -> dict[str, Any]:
        """All overrides of a row's training.

        Args:
            entry: the row.
            seed: index of the seed, from 0; it is added to the `train.seed` of the row.
        """
        point = {**entry.group.overrides(entry.row, self.scale), **(self.overrides or {})}
        first = config_of(entry.group.scales[self.scale].recipe, point).train.seed
        return {**point, "train.seed": first + seed}


def distinct_trainings(plan: ReproductionPlan, rows: Sequence[Entry]) -> Iterator[tuple[dict[str, Any], Config]]:
    """The distinct trainings of rows of one recipe, all with their first seed before the next one.

    Yields:
        The point of its search, without overrides that select data, and its configuration.
    """
    seen: set[str] = set()
    for seed in range(plan.seeds):
        for entry in rows:
            point = plan.point(entry, seed)
            config = config_of(entry.group.scales[plan.scale].recipe, point)
            digest = config.digest()
            if digest not in seen:
                seen.add(digest)
                yield {key: value for key, value in point.items() if not chooses_data(key)}, config


def short_digest(what: Any) -> str:
    """Eight hexadecimal digits over plain data, for names."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def config_of(recipe: str, overrides: Mapping[str, Any]) -> Config:
    """The configuration of a training."""
    return load_config(recipe, overrides)
