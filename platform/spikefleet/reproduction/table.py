"""Tables of the papers as data: rows, the paper's values, and the recipe of each row at each scale."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from spikefleet.config.messages import did_you_mean, error_messages
from spikefleet.config.section import Section
from spikefleet.config.strict_yaml import read_mapping
from spikefleet.errors import UserError
from spikefleet.reproduction.scales import RENAMED, SCALES, Scale
from spikefleet_models.energy_constants import energy_constants

Origin = Literal["network", "card", "run"]
"""Origin of a value. network: counted on the full network, without training. card: energy card of the trained network.
run: metrics of the checkpoint with the best validation metric."""


class Column(Section):
    """One column of a table."""

    label: str = Field(description="name of the metric")
    unit: str = Field(description="the paper's unit")
    factor: float = Field(1.0, gt=0, description="factor from our unit to the paper's")
    origin: Origin = Field("run", alias="from", description="origin of our value")


class Counted(Section):
    """How operations and energy are counted."""

    constants: str = Field(description="name of the energy constants")
    side: int = Field(32, ge=1, description="side of the full network's images, for its operations")
    shortcuts: bool = Field(True, description="count 1x1 convolutions of shortcuts too")

    @model_validator(mode="after")
    def _constants_are_known(self) -> Self:
        energy_constants(self.constants)
        return self


class Resources(Section):
    """Default resources of one training."""

    workers: int = Field(1, ge=1, description="workers of the training")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of each worker")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each worker")


class Scaling(Section):
    """The recipe of a group at one scale."""

    recipe: str = Field(description="name of the recipe")
    overrides: Mapping[str, Any] = Field(default_factory=dict, description="dotted overrides of the recipe")
    resources: Resources = Field(Resources(), description="resources of one training")


class Row(Section):
    """One row: its overrides, and the paper's values in the paper's units."""

    name: str = Field(description="name of the row")
    overrides: Mapping[str, Any] = Field(default_factory=dict, description="dotted overrides of the row")
    paper: Mapping[str, float] = Field(description="the paper's value by column")
    only_at: tuple[Scale, ...] = Field(SCALES, description="scales at which it can run")
    otherwise: str = Field("", description="why it cannot run at the others")


class Group(Section):
    """Rows on the same data."""

    name: str = Field(description="name of the group")
    data: str = Field("", description="the paper's data set, where the group has another name")
    scales: Mapping[Scale, Scaling] = Field(description="recipe at each scale")
    otherwise: str = Field("", description="why it cannot run at other scales")
    fixed: Mapping[str, Any] = Field(default_factory=dict, description="overrides of all rows at all scales")
    rows: tuple[Row, ...] = Field(min_length=1, description="its rows")

    @property
    def paper_data(self) -> str:
        """The data set that the paper's values are of."""
        return self.data or self.name

    def overrides(self, row: Row, scale: Scale) -> dict[str, Any]:
        """All overrides of the recipe for a row at a scale."""
        return {**self.scales[scale].overrides, **self.fixed, **row.overrides}

    def refusal(self, row: Row, scale: Scale) -> str | None:
        """Why a row cannot run at a scale; None if it can."""
        if scale not in self.scales:
            return self.otherwise
        return None if scale in row.only_at else row.otherwise


class PaperTable(Section):
    """A table of a paper."""

    name: str = Field(description="name of the table")
    title: str = Field(description="title of the report")
    paper: str = Field(description="the paper, and the number of the table")
    columns: Mapping[str, Column] = Field(description="columns by metric")
    counted: Counted | None = Field(None, description="how operations and energy are counted")
    groups: tuple[Group, ...] = Field(min_length=1, description="groups of rows")
    notes: tuple[str, ...] = Field((), description="notes for the report")
    not_judged: str = Field("", description="why no claim of it is judged, where it has none")

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        for entry in self.entries():
            if unknown := entry.row.paper.keys() - self.columns.keys():
                raise ValueError(f"row {entry.row.name}: {sorted(unknown)[0]} is not a column of the table")
            for scale in self.scales:
                if entry.group.refusal(entry.row, scale) == "":
                    raise ValueError(f"row {entry.row.name} does not say why it cannot run at scale {scale}")
        counted = {key for key, column in self.columns.items() if column.origin == "network"}
        if unknown := counted - {"parameters", "macs", "energy_uj"}:
            raise ValueError(f"column {sorted(unknown)[0]} cannot be counted without training")
        if "energy_uj" in counted and not {"macs", "acs"} <= self.columns.keys():
            raise ValueError("column energy_uj needs the columns macs and acs")
        self._check_one_store_for_each_recipe()
        if self.counted is None and any(column.origin != "run" for column in self.columns.values()):
            raise ValueError("'counted' is missing; it says how operations and energy are counted")
        return self

    def _check_one_store_for_each_recipe(self) -> None:
        """All trainings of a recipe at a scale share a store, and so what selects its data."""
        selecting: dict[tuple[str, str], dict[str, Any]] = {}
        for group in self.groups:
            for scale, scaling in group.scales.items():
                data = {key: value for key, value in scaling.overrides.items() if key.startswith("data.options.")}
                if selecting.setdefault((scale, scaling.recipe), data) != data:
                    raise ValueError(f"groups with recipe {scaling.recipe} have other data at scale {scale}")

    @property
    def scales(self) -> tuple[Scale, ...]:
        """The scales at which rows of the table can run, smaller ones first."""
        return tuple(scale for scale in SCALES if any(scale in group.scales for group in self.groups))

    def scale(self, name: Scale | None) -> Scale:
        """A scale by its name; the smallest one of the table for None.

        Raises:
            UserError: the table has no such scale; the message has its new name, if it was renamed.
        """
        if name is None:
            return self.scales[0]
        if name in self.scales:
            return name
        new = RENAMED.get(name)
        if new in self.scales:
            raise UserError(f"scale {name!r} of {self.name} was renamed; use --scale {new}")
        raise UserError(f"{self.name} has no scale {name!r}; use one of {', '.join(self.scales)}")

    def entries(self, pattern: str = "*") -> Iterator[Entry]:
        """Iterates over the rows whose name, or "GROUP: NAME", matches an fnmatch pattern."""
        for group in self.groups:
            for row in group.rows:
                entry = Entry(group, row)
                if fnmatch.fnmatchcase(row.name, pattern) or fnmatch.fnmatchcase(entry.full_name, pattern):
                    yield entry


@dataclass(frozen=True)
class Entry:
    """A row with its group."""

    group: Group
    row: Row

    @property
    def full_name(self) -> str:
        """`GROUP: NAME`."""
        return f"{self.group.name}: {self.row.name}"


def list_tables() -> list[str]:
    """Names of the tables that come with the package."""
    folder = resources.files("spikefleet.reproduction") / "tables"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_table(name: str) -> PaperTable:
    """A table by its name. Raises UserError, with the nearest name, for an unknown one."""
    if name not in list_tables():
        hint = did_you_mean(name, list_tables(), "`spikefleet tables` lists them")
        raise UserError(f"table {name!r} does not exist; {hint}")
    text = (resources.files("spikefleet.reproduction") / "tables" / f"{name}.yaml").read_text(encoding="utf-8")
    tree = {"name": name, **read_mapping(text, f"table {name}", "title, paper, columns and groups")}
    try:
        return PaperTable.model_validate(tree)
    except ValidationError as error:  # only during the development of a table
        raise UserError(f"table {name}: {error_messages(error, PaperTable, tree)}") from None
