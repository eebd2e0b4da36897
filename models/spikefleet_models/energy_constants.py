"""Energies of operations, by name; without torch, so that tables of papers are checked without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EnergyConstants:
    """Energy of one operation in pJ, under a name that never changes its meaning."""

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
    )
}


def energy_constants(constants: str | EnergyConstants) -> EnergyConstants:
    """Constants by name. Raises ValueError for an unknown one."""
    if isinstance(constants, EnergyConstants):
        return constants
    if constants not in CONSTANTS:
        raise ValueError(f"unknown energy constants {constants!r}; known are {', '.join(CONSTANTS)}")
    return CONSTANTS[constants]
