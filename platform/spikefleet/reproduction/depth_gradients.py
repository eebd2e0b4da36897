"""The first layer's gradient over depth, of four connections, with and without shortcut back-propagation.

Zhang et al. (Front. Neurosci. 2023) explain by gradients why Spiking ResNet does not train at 34 layers, Guo et al.
(NeurIPS 2024) why side branches help. Measured at initialisation: one backward pass of the training's loss on noise.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from spikefleet.config.recipes import load_config
from spikefleet.errors import UserError
from spikefleet.files import read_json_object
from spikefleet.training.gradient_check import check_gradients, noise_batch
from spikefleet_tune.atomic import write_atomically

GRADIENTS = "depth_gradients.json"
"""File name beside recorded results."""

CONNECTIONS: Mapping[str, str] = {
    "BSG": "bsg",
    "SEW, ADD": "add",
    "SEW, IAND": "iand",
    "post-addition": "post_add",
}
"""`model.connection` by the name that is shown."""

DEPTHS: Mapping[int, Sequence[int]] = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (4, 6, 10, 4)}
"""`model.stages` by the number of weight layers, with two convolutions in each block."""

_VANISHED = 1e-30
"""In place of a norm of 0, of which there is no logarithm."""


@dataclass(frozen=True)
class DepthGradient:
    """One measurement."""

    connection: str
    branches: bool
    """With side branches after each stage, each with a loss of its own."""
    layers: int
    seed: int
    first_to_last: float
    """Gradient norm of the first layer over that of the last one that feeds neurons."""
    rates: tuple[float, ...]
    """Firing rate behind each layer that feeds neurons, in network order."""


@dataclass(frozen=True)
class DepthGradients:
    """All measurements, and how they were made."""

    recipe: str
    overrides: Mapping[str, Any]
    code_version: str
    rows: tuple[DepthGradient, ...]

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len({row.seed for row in self.rows})

    @property
    def depths(self) -> list[int]:
        """The depths in weight layers, smaller ones first."""
        return sorted({row.layers for row in self.rows})

    def ratios(self) -> dict[tuple[str, bool], dict[int, float]]:
        """By connection and side branches, then by depth: the geometric mean of `first_to_last` over seeds."""
        groups: dict[tuple[str, bool], dict[int, list[float]]] = {}
        for row in sorted(self.rows, key=lambda row: row.layers):
            groups.setdefault((row.connection, row.branches), {}).setdefault(row.layers, []).append(row.first_to_last)
        return {
            key: {depth: _geometric_mean(values) for depth, values in by_depth.items()}
            for key, by_depth in groups.items()
        }

    def write(self, folder: Path) -> Path:
        """Writes the file of a folder of recorded results, one measurement a line."""
        head = {"recipe": self.recipe, "overrides": dict(self.overrides), "code_version": self.code_version}
        rows = ",\n".join(json.dumps(asdict(row)) for row in self.rows)
        write_atomically(folder / GRADIENTS, f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n')
        return folder / GRADIENTS

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Reads the file of a folder; None if it has none. Raises UserError if it is damaged."""
        path = folder / GRADIENTS
        if not path.is_file():
            return None
        plain = read_json_object(path, "recipe", "overrides", "code_version", "rows")
        try:
            rows = tuple(DepthGradient(**{**row, "rates": tuple(row["rates"])}) for row in plain["rows"])
            return cls(plain["recipe"], plain["overrides"], plain["code_version"], rows)
        except (TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged: {error}; measure it again") from None


def measure(
    recipe: str, overrides: Mapping[str, Any], connection: str, branches: bool, layers: int, seed: int, images: int = 8
) -> DepthGradient:
    """Measures one network.

    Args:
        recipe: of the network.
        overrides: of the recipe.
        connection: key of CONNECTIONS.
        branches: with side branches after each stage.
        layers: key of DEPTHS.
        seed: of the weights and the noise.
        images: noise images of 16x16 pixels.
    """
    own = {
        "model.connection": CONNECTIONS[connection],
        "model.stages": list(DEPTHS[layers]),
        "shortcut.where": "stage" if branches else "none",
        "train.seed": seed,
    }
    config = load_config(recipe, {**overrides, **own})
    check = check_gradients(config, *noise_batch(config, images, 16))
    rates = tuple(round(row.firing_rate, 4) for row in check.layers if row.firing_rate is not None)
    return DepthGradient(connection, branches, layers, seed, check.first_to_last, rates)


def _geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(value, _VANISHED)) for value in values))
