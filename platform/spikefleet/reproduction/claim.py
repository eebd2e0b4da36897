"""Claims of the papers as data: which rows of a table are compared, and which of them the paper finds better."""

from __future__ import annotations

from importlib import resources
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from spikefleet.config.messages import error_messages
from spikefleet.config.section import Section
from spikefleet.config.strict_yaml import read_mapping
from spikefleet.errors import UserError
from spikefleet.reproduction.table import Entry, PaperTable

Direction = Literal["greater", "less"]


class ComparedRows(Section):
    """Two rows of a table that differ in what the claim is about."""

    first: str = Field(description="name of the row that the claim speaks of")
    second: str = Field(description="name of the row that it is compared with")
    at: str = Field(description="what both have in common, such as the depth")


class Claim(Section):
    """One claim of a paper, over one or several depths or T."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="name of the claim in its table")
    says: str = Field(description="the claim in a sentence")
    column: str = Field(description="column of the table that is compared")
    direction: Direction = Field("greater", description="whether `first` is greater or less than `second`")
    source: Literal["paper", "project"] = Field("paper", description="who claims it; those of the project are apart")
    pairs: tuple[ComparedRows, ...] = Field(min_length=1, description="the rows that are compared")

    @property
    def sign(self) -> int:
        """1 if `first` is claimed to be greater, -1 if less."""
        return 1 if self.direction == "greater" else -1


class Claims(Section):
    """The claims of a table."""

    claims: tuple[Claim, ...] = Field(min_length=1, description="its claims")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [claim.name for claim in self.claims]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"claim {repeated} is there twice")
        return self


def paper_difference(claim: Claim, pair: ComparedRows, table: PaperTable) -> float | None:
    """The paper's `first` - `second`, in the unit of the column; None where a row has no value of the paper's."""
    first, second = (entry_of(table, name).row.paper.get(claim.column) for name in (pair.first, pair.second))
    return None if first is None or second is None else first - second


def entry_of(table: PaperTable, name: str) -> Entry:
    """The row of a name. Raises UserError for an unknown or ambiguous one."""
    found = [entry for entry in table.entries() if name in (entry.row.name, entry.full_name)]
    if len(found) != 1:
        known = ", ".join(entry.full_name for entry in table.entries())
        raise UserError(f"{table.name} has {len(found)} rows of the name {name!r}, expected one of {known}")
    return found[0]


def list_claimed() -> list[str]:
    """Names of the tables with claims."""
    folder = resources.files("spikefleet.reproduction") / "claims"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_claims(table: PaperTable) -> tuple[Claim, ...]:
    """The claims of a table; none where it has no file of them.

    Raises:
        UserError: the file is invalid, or a claim names a row or column that the table does not have, contradicts the
            paper's own values, or is called the project's and compares the paper's rows.
    """
    if table.name not in list_claimed():
        return ()
    text = (resources.files("spikefleet.reproduction") / "claims" / f"{table.name}.yaml").read_text(encoding="utf-8")
    return parse_claims(text, table)


def parse_claims(text: str, table: PaperTable) -> tuple[Claim, ...]:
    """Claims from the YAML of a table. Raises UserError as `load_claims`."""
    what = f"claims of {table.name}"
    tree = read_mapping(text, what, "claims")
    try:
        claims = Claims.model_validate(tree).claims
    except ValidationError as error:
        raise UserError(f"{what}: {error_messages(error, Claims, tree)}") from None
    for claim in claims:
        if claim.column not in table.columns:
            raise UserError(
                f"{what}: {claim.name} compares {claim.column!r}, expected one of {', '.join(table.columns)}"
            )
        for pair in claim.pairs:
            difference = paper_difference(claim, pair, table)
            if difference is not None and claim.source == "project":
                raise UserError(f"{what}: {claim.name} at {pair.at} compares values of the paper; its source is paper")
            if difference is not None and difference * claim.sign <= 0:
                raise UserError(
                    f"{what}: {claim.name} at {pair.at} claims {claim.direction}, but the paper's values differ by "
                    f"{difference:+g}"
                )
    return claims
