"""The rows of a table with our results beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from spikefleet.reproduction.plan import ReproductionPlan, config_of, short_digest
from spikefleet.reproduction.results import Training, mixtures
from spikefleet.reproduction.table import Entry, PaperTable
from spikefleet_models.energy import energy_at_rates
from spikefleet_models.energy_constants import energy_constants
from spikefleet_models.families import build_model
from spikefleet_tune.messages import counted


@dataclass(frozen=True)
class Cell:
    """A value of the paper and ours, in the paper's unit."""

    paper: float | None
    values: tuple[float, ...] = ()
    """Ours, one for each seed; a single one if no training is needed."""
    same_data: bool = True
    """Whether ours are of the paper's data set; of another one they are another quantity."""

    @property
    def mean(self) -> float | None:
        """Our mean over seeds; None without values."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None with fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Our mean minus the paper's value; None where ours are of other data."""
        return None if self.mean is None or self.paper is None or not self.same_data else self.mean - self.paper


@dataclass(frozen=True)
class ReproducedRow:
    """A row of the table with its results and their origin."""

    entry: Entry
    cells: Mapping[str, Cell]
    seeds: tuple[int, ...] = ()
    trials: tuple[str, ...] = ()
    data_hashes: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    split: str = ""
    """What the task's metrics were measured on: "test", or "val" where the data have no other images to report on."""
    remark: str = ""
    """Why it was not run, or not with all seeds; and which layers of its energy multiply sums of spikes."""
    data: str = ""
    """Name of the data set of its trainings; empty where it cannot run."""
    same_data: bool = True
    """Whether that is the paper's."""

    @property
    def name(self) -> str:
        """The data set of its trainings, and its name."""
        return self.entry.full_name if self.same_data or not self.data else f"{self.data}: {self.entry.row.name}"


@dataclass(frozen=True)
class Reproduction:
    """A table with our results beside the paper's."""

    plan: ReproductionPlan
    rows: tuple[ReproducedRow, ...]

    @property
    def name(self) -> str:
        """Table and scale, with a digest of the chosen rows and the overrides, if any."""
        name = f"{self.plan.table.name}-{self.plan.scale}"
        if self.plan.only == "*" and not self.plan.overrides:
            return name
        return f"{name}-{short_digest([self.plan.only, dict(self.plan.overrides or {})])}"

    def pairs_in_order(self, column: str) -> tuple[int, int]:
        """Compares the order of rows with the paper's, within each group.

        Columns that are counted without training are left out.

        Args:
            column: key of the column.

        Returns:
            The number of pairs of rows in the paper's order, and the number of pairs that can be compared.
        """
        if self.plan.table.columns[column].origin == "network":
            return 0, 0
        kept = compared = 0
        for one, other in combinations(self.rows, 2):
            mine, theirs = one.cells[column], other.cells[column]
            if one.entry.group is not other.entry.group or None in (mine.mean, mine.paper, theirs.mean, theirs.paper):
                continue
            expected = mine.paper - theirs.paper  # type: ignore[operator]
            found = mine.mean - theirs.mean  # type: ignore[operator]
            if expected:
                compared += 1
                kept += expected * found > 0
        return kept, compared


def measured_row(
    plan: ReproductionPlan, entry: Entry, known: Mapping[str, Training], problems: Mapping[str, str]
) -> ReproducedRow:
    """The results of a row.

    Args:
        plan: its plan.
        entry: the row.
        known: finished trainings by digest.
        problems: by digest, why a training has no result.
    """
    recipe = entry.group.scales[plan.scale].recipe
    trainings: list[Training] = []
    missing: list[str] = []
    for seed in range(plan.seeds):
        config = config_of(recipe, plan.point(entry, seed))
        digest, own = config.digest(), config.train.seed
        if digest in known:
            trainings.append(known[digest])
        else:
            missing.append(f"seed {own} {problems.get(digest, 'was not run')}")
    remarks = [*missing, *energy_remark(plan.table, trainings), *mixtures(trainings), *_on_other_data(trainings, known)]
    data, same = data_shown(plan, entry, trainings)
    return ReproducedRow(
        entry,
        cells_of(plan.table, entry, trainings, same),
        tuple(training.seed for training in trainings),
        tuple(training.trial for training in trainings),
        tuple(dict.fromkeys(training.data_hash for training in trainings)),
        tuple(dict.fromkeys(training.code_version for training in trainings)),
        split_of(plan.table, trainings),
        "; ".join(remarks) if trainings or not missing else f"not run: {'; '.join(missing)}",
        data,
        same,
    )


def _on_other_data(trainings: Sequence[Training], known: Mapping[str, Training]) -> Iterator[str]:
    """Where a row was trained on one content of the data, and other trainings of its recipe on another one."""
    own, every = ({one.data_hash[:12] for one in some} for some in (trainings, known.values()))
    if len(own) == 1 and (others := sorted(every - own)):
        yield (
            f"trained on other data (content {', '.join(own)}) than other recorded trainings of its recipe "
            f"({', '.join(others)}), with which it cannot be compared; record all of them on the same data"
        )


def data_shown(plan: ReproductionPlan, entry: Entry, trainings: Sequence[Training]) -> tuple[str, bool]:
    """The data set of a row's trainings, or that they are meant for, and whether the paper's values are of it."""
    config = config_of(entry.group.scales[plan.scale].recipe, entry.group.overrides(entry.row, plan.scale))
    meant = config.registry.dataset or config.data.source
    data = ", ".join(dict.fromkeys(training.dataset for training in trainings)) or meant
    few = plan.data_of(entry).get("data.options.train_images")
    return (data, _is_papers(entry, data)) if few is None else (f"{data} ({few:,} training images)", False)


def _is_papers(entry: Entry, data: str) -> bool:
    """Whether a data set is the one that the paper's values of a row are of."""
    full = entry.group.scales.get("full")
    return full is not None and data == config_of(full.recipe, {}).registry.dataset


def cells_of(table: PaperTable, entry: Entry, trainings: Sequence[Training], same_data: bool = True) -> dict[str, Cell]:
    """The values of a row by column.

    Args:
        table: of the row.
        entry: the row.
        trainings: of the row, one for each seed.
        same_data: whether they are on the paper's data set.
    """
    known = network_metrics(table, entry) if any(c.origin == "network" for c in table.columns.values()) else {}
    cells = {}
    for key, column in table.columns.items():
        if column.origin == "network":
            values = [known[key]] if key in known else []
        else:
            found = (value_of(table, key, training) for training in trainings)
            values = [value for value in found if value is not None]
        ours = tuple(value * column.factor for value in values)
        # The full network is that of the paper's data, whatever the scale.
        cells[key] = Cell(entry.row.paper.get(key), ours, same_data or column.origin == "network")
    return cells


def value_of(table: PaperTable, key: str, training: Training) -> float | None:
    """A training's value of a column, in our unit; None where it has none, or no energy card to count it on."""
    column = table.columns[key]
    if column.origin == "run":
        return training.metrics.get(key, training.metrics.get(_on_validation(key)))
    assert table.counted is not None, "the table's validation requires it"
    if training.card is None:
        return None
    value: float | None = getattr(training.card.under(table.counted.constants), key)
    return value


def _on_validation(key: str) -> str:
    """The key of a test metric where the validation split has the only images to report on, as on COCO and ImageNet."""
    return f"val/{key.removeprefix('test/')}" if key.startswith("test/") else key


def split_of(table: PaperTable, trainings: Sequence[Training]) -> str:
    """The split of the table's test metrics in trainings: "test", "val", or "" without such metrics."""
    keys = [key for key in table.columns if key.startswith("test/")]
    if any(key in training.metrics for training in trainings for key in keys):
        return "test"
    return "val" if any(_on_validation(key) in training.metrics for training in trainings for key in keys) else ""


def energy_remark(table: PaperTable, trainings: Sequence[Training]) -> Iterator[str]:
    """What a reader of energies must know: layers that no chip of binary spikes runs as additions; missing cards."""
    if any(column.origin == "card" for column in table.columns.values()):
        cards = [training.card for training in trainings if training.card is not None]
        if missing := len(trainings) - len(cards):
            yield f"{counted(missing, 'training')} without an energy card"
        if layers := dict.fromkeys(layer for card in cards for layer in card.integer_fed):
            yield f"{counted(len(layers), 'layer')} fed by sums of spikes, counted as MACs"


def network_metrics(table: PaperTable, entry: Entry) -> dict[str, float]:
    """Parameters, MACs, and energy with the paper's additions: counted on the full network, without training."""
    if "full" not in entry.group.scales:
        return {}
    assert table.counted is not None, "the table's validation requires it"
    config = config_of(entry.group.scales["full"].recipe, entry.group.overrides(entry.row, "full"))
    with torch.device("meta"):
        network = build_model(config.model)
    metrics = {"parameters": float(sum(parameter.numel() for parameter in network.parameters()))}
    if "macs" not in table.columns:
        return metrics
    side, constants = table.counted.side, energy_constants(table.counted.constants)
    card = energy_at_rates(network, (side, side), 0.0, constants, shortcuts=table.counted.shortcuts)
    additions = entry.row.paper.get("acs", 0.0) / table.columns["acs"].factor
    metrics["macs"] = card.macs
    if card.integer_fed:  # the paper's additions include these layers, which are among the MACs
        return metrics
    picojoules = card.macs * constants.mac_pj + additions * constants.ac_pj
    return {**metrics, "energy_uj": picojoules / 1e6}
