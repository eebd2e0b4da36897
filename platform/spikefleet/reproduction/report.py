"""The report of a reproduced table: for a terminal, as Markdown, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spikefleet import plots
from spikefleet.files import write_json
from spikefleet.reproduction.reproduce import Cell, ReproducedRow, Reproduction
from spikefleet.reproduction.table import Column
from spikefleet_tune.atomic import write_atomically
from spikefleet_tune.messages import counted

REPORT = "report.md"

_OTHER_DATA = "The data differs from the paper's, so only the order of rows can be compared"
_SCALES = {
    "full": "the paper's networks and data",
    "digits": f"scaled down: narrow networks on digits (detection: on scenes of them). {_OTHER_DATA}",
    "fashion_mnist": f"scaled down: narrow networks on Fashion-MNIST. {_OTHER_DATA}",
}


def write_reproduction(found: Reproduction, folder: Path) -> list[Path]:
    """Writes `report.md`, `report.json` and, if any row has a result, `report.png`. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", as_data(found))
    write_atomically(folder / REPORT, as_markdown(found))
    paths = [folder / "report.json", folder / REPORT]
    (folder / "report.png").unlink(missing_ok=True)
    drawn = [key for key in found.plan.table.columns if any(row.cells[key].values for row in found.rows)]
    if drawn:
        panels = {
            f"{found.plan.table.columns[key].label}, {found.plan.table.columns[key].unit}": [
                (row.entry.full_name, row.cells[key].paper, row.cells[key].mean, row.cells[key].deviation)
                for row in found.rows
                if row.cells[key].values
            ]
            for key in drawn
        }
        plots.paper_and_ours(panels, f"{found.plan.table.paper}; scale {found.plan.scale}", folder / "report.png")
        paths.append(folder / "report.png")
    return paths


def as_table(found: Reproduction) -> list[tuple[str, ...]]:
    """For a terminal: the paper's value, then ours; the first row is the header."""
    heads = (f"{column.label}, {column.unit}" for column in found.plan.table.columns.values())
    rows: list[tuple[str, ...]] = [("row", *heads, "seeds")]
    for row in found.rows:
        cells = (f"{_plain(cell.paper)} | {_ours(cell)}" for cell in row.cells.values())
        rows.append((row.entry.full_name, *cells, str(len(row.seeds) or "-")))
    return rows


def remarks(found: Reproduction) -> Iterator[str]:
    """Iterates over the reasons why rows were not run, or not with all seeds."""
    for row in found.rows:
        if row.remark:
            yield f"{row.entry.full_name}: {row.remark}"


def order_sentences(found: Reproduction) -> Iterator[str]:
    """Iterates over sentences on how many pairs of rows have the paper's order, one for each column."""
    for key, column in found.plan.table.columns.items():
        kept, compared = found.pairs_in_order(key)
        if compared:
            yield f"{column.label}: {kept} of {counted(compared, 'pair')} of rows in the paper's order"


def as_markdown(found: Reproduction) -> str:
    """The whole report as Markdown."""
    table, columns = found.plan.table, found.plan.table.columns
    lines = [f"# {table.title}", "", f"{table.paper}. Scale `{found.plan.scale}`: {_SCALES[found.plan.scale]}.", ""]
    if found.plan.overrides:
        changed = ", ".join(f"`{key}={value}`" for key, value in found.plan.overrides.items())
        lines += [f"All rows were run with the overrides {changed}.", ""]
    heads = [part for column in columns.values() for part in _heads(column)]
    lines += _markdown_row(["row", *heads, "seeds", "remark"]), _markdown_row(["---"] * (len(heads) + 3))
    for row in found.rows:
        values = [part for cell in row.cells.values() for part in (_plain(cell.paper), _ours(cell), _difference(cell))]
        seeds = " ".join(map(str, row.seeds)) or "-"
        lines.append(_markdown_row([row.entry.full_name, *values, seeds, row.remark]))
    lines += ["", "Ours: mean ± standard deviation over seeds; difference: ours minus the paper's.", ""]
    lines += [f"* {sentence}." for sentence in order_sentences(found)]
    if on_val := ", ".join(row.entry.full_name for row in found.rows if row.split == "val"):
        lines.append(f"* Measured on val, on which the checkpoint was chosen too, for want of other images: {on_val}.")
    lines += [f"* {note}" for note in table.notes]
    lines += ["", _markdown_row(["row", "trials", "measured on", "data", "code"]), _markdown_row(["---"] * 5)]
    for row in found.rows:
        if row.trials:
            data = ", ".join(digest[:12] for digest in row.data_hashes)
            cells = [row.entry.full_name, ", ".join(row.trials), row.split or "-", data, ", ".join(row.commits)]
            lines.append(_markdown_row(cells))
    return "\n".join(lines) + "\n"


def as_data(found: Reproduction) -> dict[str, Any]:
    """The whole report as plain data, the content of report.json."""
    return {
        "table": found.plan.table.name,
        "paper": found.plan.table.paper,
        "scale": found.plan.scale,
        "overrides": dict(found.plan.overrides or {}),
        "columns": {key: {"label": one.label, "unit": one.unit} for key, one in found.plan.table.columns.items()},
        "rows": [_row_as_data(row) for row in found.rows],
        "pairs_in_order_and_compared": {key: list(found.pairs_in_order(key)) for key in found.plan.table.columns},
        "notes": list(found.plan.table.notes),
    }


def _row_as_data(row: ReproducedRow) -> dict[str, Any]:
    metrics = {
        key: {
            "paper": cell.paper,
            "mean": cell.mean,
            "deviation": cell.deviation,
            "values": list(cell.values),
            "difference": cell.difference,
        }
        for key, cell in row.cells.items()
    }
    return {
        "group": row.entry.group.name,
        "row": row.entry.row.name,
        "figures": metrics,  # the key of report.json since the first release
        "seeds": list(row.seeds),
        "trials": list(row.trials),
        "data_hashes": list(row.data_hashes),
        "code_versions": list(row.commits),
        "split": row.split,
        "remark": row.remark,
    }


def _heads(column: Column) -> list[str]:
    return [f"{column.label}, {column.unit}: paper", "ours", "difference"]


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _ours(cell: Cell) -> str:
    if cell.mean is None:
        return "-"
    return _plain(cell.mean) if cell.deviation is None else f"{_plain(cell.mean)} ± {cell.deviation:.2g}"


def _difference(cell: Cell) -> str:
    return "-" if cell.difference is None else f"{cell.difference:+.3g}"
