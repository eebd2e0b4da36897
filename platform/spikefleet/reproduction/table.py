"""Tables of the papers as data: rows, the paper's figures, and what stands for each row at each scale."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from spikefleet.config.messages import did_you_mean, sentences
from spikefleet.config.schema import Section
from spikefleet.config.strict_yaml import read_mapping
from spikefleet.errors import UserError
from spikefleet.reproduction.scales import Scale
from spikefleet_models.energy_constants import energy_constants

Origin = Literal["network", "card", "run"]
"""Where a figure comes from: counted on the full network without training; the energy card of a trained network; the
figures of the training, those of the checkpoint with the best validation metric."""


class Column(Section):
    """One kind of figure in a table."""

    label: str
    unit: str
    factor: float = Field(1.0, gt=0, description="ours times this is in the paper's unit")
    origin: Origin = Field("run", alias="from")


class Counted(Section):
    """How operations and energy are counted."""

    constants: str = Field(description="of energies")
    side: int = Field(32, ge=1, description="side of the full network's pictures, for its operations")
    shortcuts: bool = Field(True, description="1x1 convolutions of shortcuts count among its operations")

    @model_validator(mode="after")
    def _constants_are_known(self) -> Self:
        energy_constants(self.constants)
        return self


class Resources(Section):
    """What one training takes by default."""

    workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)


class Scaling(Section):
    """What stands for the paper's data and network at a scale."""

    recipe: str
    overrides: Mapping[str, Any] = Field(default_factory=dict)
    resources: Resources = Resources()


class Row(Section):
    """One row: what distinguishes it, and the paper's figures in the paper's units."""

    name: str
    overrides: Mapping[str, Any] = Field(default_factory=dict)
    paper: Mapping[str, float]
    only_at: tuple[Scale, ...] = Field(("digits", "fashion_mnist", "full"), description="scales at which it can run")
    otherwise: str = Field("", description="why it cannot run at the others")


class Group(Section):
    """Rows on the same data."""

    name: str
    scales: Mapping[Scale, Scaling]
    otherwise: str = Field("", description="why it cannot run at other scales")
    fixed: Mapping[str, Any] = Field(default_factory=dict, description="overrides of all rows at all scales")
    rows: tuple[Row, ...] = Field(min_length=1)

    def overrides(self, row: Row, scale: Scale) -> dict[str, Any]:
        """All overrides of a row, laid over the recipe of its scale."""
        return {**self.scales[scale].overrides, **self.fixed, **row.overrides}

    def refusal(self, row: Row, scale: Scale) -> str | None:
        """Why a row cannot run at a scale; None where it can."""
        if scale not in self.scales:
            return self.otherwise
        return None if scale in row.only_at else row.otherwise


class PaperTable(Section):
    """A table of a paper."""

    name: str
    title: str
    paper: str
    columns: Mapping[str, Column]
    counted: Counted | None = None
    groups: tuple[Group, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        scales: tuple[Scale, ...] = ("digits", "fashion_mnist", "full")
        for entry in self.entries():
            if unknown := entry.row.paper.keys() - self.columns.keys():
                raise ValueError(f"row {entry.row.name}: {sorted(unknown)[0]} is no column of the table")
            for scale in scales:
                if entry.group.refusal(entry.row, scale) == "":
                    raise ValueError(f"row {entry.row.name} does not say why it cannot run at scale {scale}")
        counted = {key for key, column in self.columns.items() if column.origin == "network"}
        if unknown := counted - {"parameters", "macs", "energy_uj"}:
            raise ValueError(f"column {sorted(unknown)[0]} cannot be counted without training")
        if "energy_uj" in counted and not {"macs", "acs"} <= self.columns.keys():
            raise ValueError("energy_uj is that of the network's MACs and the paper's ACs; both need a column")
        if self.counted is None and any(column.origin != "run" for column in self.columns.values()):
            raise ValueError("counted is missing: it says how operations and energy are counted")
        return self

    def entries(self, pattern: str = "*") -> Iterator[Entry]:
        """Rows with their groups, those whose name (or "GROUP: NAME") matches an fnmatch pattern."""
        for group in self.groups:
            for row in group.rows:
                entry = Entry(group, row)
                if fnmatch.fnmatchcase(row.name, pattern) or fnmatch.fnmatchcase(entry.full_name, pattern):
                    yield entry


@dataclass(frozen=True)
class Entry:
    """A row in its group."""

    group: Group
    row: Row

    @property
    def full_name(self) -> str:
        return f"{self.group.name}: {self.row.name}"


def list_tables() -> list[str]:
    """Names of the tables that come with the package."""
    folder = resources.files("spikefleet.reproduction") / "tables"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_table(name: str) -> PaperTable:
    """A table by its name. Raises UserError for an unknown one, with the nearest that exists."""
    if name not in list_tables():
        hint = did_you_mean(name, list_tables(), "`spikefleet tables` lists them")
        raise UserError(f"there is no table {name!r}; {hint}")
    text = (resources.files("spikefleet.reproduction") / "tables" / f"{name}.yaml").read_text(encoding="utf-8")
    tree = {"name": name, **read_mapping(text, f"table {name}", "title, paper, columns and groups")}
    try:
        return PaperTable.model_validate(tree)
    except ValidationError as error:  # only while a table is being written
        raise UserError(f"table {name}: {sentences(error, PaperTable, tree)}") from None
