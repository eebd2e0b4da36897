"""Energies of operations, by name; without torch, so that tables of papers are checked without it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class EnergyConstants:
    """Energy of one operation in pJ, under a name and version whose values never change."""

    name: str
    version: int
    mac_pj: float
    ac_pj: float
    source: str


_HOROWITZ = "M. Horowitz, ISSCC 2014"
CONSTANTS = {
    constants.name: constants
    for constants in (
        EnergyConstants("int32-45nm", 1, 3.1, 0.1, f"{_HOROWITZ}: int32 multiply, add; as Zhang et al. 2023"),
        EnergyConstants("fp32-45nm", 1, 4.6, 0.9, f"{_HOROWITZ}: fp32 multiply and add, add; as Luo et al. 2024"),
        EnergyConstants(
            "int8-45nm", 1, 4.6, 0.1, f"{_HOROWITZ}: fp32 multiply and add of real values, int32 add of int8 weights"
        ),
    )
}


def energy_constants(constants: str | EnergyConstants) -> EnergyConstants:
    """Look up constants by name; constants themselves are returned unchanged.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(constants, EnergyConstants):
        return constants
    if constants not in CONSTANTS:
        nearest = difflib.get_close_matches(constants, CONSTANTS, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown energy constants {constants!r}, expected one of {', '.join(CONSTANTS)}{hint}")
    return CONSTANTS[constants]
