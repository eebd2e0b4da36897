"""The report of a reproduced table: for a terminal, as Markdown, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spikefleet import plots
from spikefleet.files import write_json
from spikefleet.reproduction.rows import Cell, ReproducedRow, Reproduction
from spikefleet.reproduction.table import Column
from spikefleet_tune.atomic import write_atomically
from spikefleet_tune.messages import counted

REPORT = "report.md"

_OTHER_DATA = "The data differs from the paper's, so only the order of rows can be compared"
_DIFFERENCE = "Difference: ours minus the paper's, where both are of the same data set."
_NO_DIFFERENCE = "Ours are of other data, so no difference is formed."
SCALES = {
    "full": "the paper's networks and data",
    "digits": f"scaled down: narrow networks on digits. {_OTHER_DATA}",
    "digits_300": f"scaled down: narrow networks trained on 300 images of digits. {_OTHER_DATA}",
    "fashion_mnist_10k": "scaled down: an eighth of the width, trained on 10,000 images of Fashion-MNIST. "
    f"{_OTHER_DATA}",
    "fashion_mnist": f"scaled down: narrow networks on Fashion-MNIST. {_OTHER_DATA}",
    "scenes": f"scaled down: a narrow network on scenes of digits. {_OTHER_DATA}",
    "saccade_scenes": f"scaled down: a narrow network on moving digits before a simulated event camera. {_OTHER_DATA}",
}
"""What each scale is, for reports."""


def write_reproduction(found: Reproduction, folder: Path) -> list[Path]:
    """Writes `report.md`, `report.json` and, if any row has a result, `report.png`. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", as_data(found))
    write_atomically(folder / REPORT, as_markdown(found))
    paths = [folder / "report.json", folder / REPORT]
    (folder / "report.png").unlink(missing_ok=True)
    if panels := _panels(found):
        plots.paper_and_ours(panels, f"{found.plan.table.paper}; scale {found.plan.scale}", folder / "report.png")
        paths.append(folder / "report.png")
    return paths


def _panels(found: Reproduction) -> dict[str, list[tuple[str, float | None, float | None, float | None]]]:
    """What to plot: ours beside the paper's; where ours are of other data, in panels of their own."""
    panels: dict[str, list[tuple[str, float | None, float | None, float | None]]] = {}
    for key, column in found.plan.table.columns.items():
        measured = [(row, row.cells[key]) for row in found.rows if row.cells[key].values]
        if same := [(row, cell) for row, cell in measured if cell.same_data]:
            panels[_head(column)] = [(row.entry.full_name, cell.paper, cell.mean, cell.deviation) for row, cell in same]
        if other := [(row, cell) for row, cell in measured if not cell.same_data]:
            on = ", ".join(dict.fromkeys(row.data for row, _ in other))
            panels[f"{_head(column)}, on {on}"] = [(row.name, None, cell.mean, cell.deviation) for row, cell in other]
            papers = [(row.entry, cell.paper) for row, cell in other if cell.paper is not None]
            if papers:
                on = ", ".join(dict.fromkeys(entry.group.paper_data for entry, _ in papers))
                panels[f"the paper's {_head(column)}, on {on}"] = [
                    (entry.full_name, value, None, None) for entry, value in papers
                ]
    return panels


def as_table(found: Reproduction) -> list[tuple[str, ...]]:
    """For a terminal: ours and the paper's value, with the data set of each; the first row is the header."""
    columns = found.plan.table.columns.values()
    heads = (head for column in columns for head in (_head(column), f"paper: {column.label}"))
    rows: list[tuple[str, ...]] = [("row", *heads, "paper's data", "seeds")]
    for row in found.rows:
        cells = (part for cell in row.cells.values() for part in (_ours(cell), _plain(cell.paper)))
        rows.append((row.name, *cells, row.entry.group.paper_data, str(len(row.seeds) or "-")))
    return rows


def remarks(found: Reproduction) -> Iterator[str]:
    """Iterates over the reasons why rows were not run, or not with all seeds."""
    for row in found.rows:
        if row.remark:
            yield f"{row.name}: {row.remark}"


def order_sentences(found: Reproduction) -> Iterator[str]:
    """Iterates over sentences on how many pairs of rows have the paper's order, one for each column."""
    for key, column in found.plan.table.columns.items():
        kept, compared = found.pairs_in_order(key)
        if compared:
            yield f"{column.label}: {kept} of {counted(compared, 'pair')} of rows in the paper's order"


def as_markdown(found: Reproduction) -> str:
    """The whole report as Markdown."""
    table, columns = found.plan.table, found.plan.table.columns
    lines = [f"# {table.title}", "", f"{table.paper}. Scale `{found.plan.scale}`: {SCALES[found.plan.scale]}.", ""]
    if found.plan.overrides:
        changed = ", ".join(f"`{key}={value}`" for key, value in found.plan.overrides.items())
        lines += [f"All rows were run with the overrides {changed}.", ""]
    compared = {key for key in columns if any(row.cells[key].difference is not None for row in found.rows)}
    heads = [part for key, column in columns.items() for part in _heads(column, key in compared)]
    lines += (
        _markdown_row(["row", *heads, "paper's data", "seeds", "remark"]),
        _markdown_row(["---"] * (len(heads) + 4)),
    )
    for row in found.rows:
        values = [part for key, cell in row.cells.items() for part in _parts(cell, key in compared)]
        seeds = " ".join(map(str, row.seeds)) or "-"
        lines.append(_markdown_row([row.name, *values, row.entry.group.paper_data, seeds, row.remark]))
    lines += ["", "Ours: mean ± standard deviation over seeds, on the data set that the row names."]
    lines += [f"The paper's values are of its own data set. {_DIFFERENCE if compared else _NO_DIFFERENCE}", ""]
    lines += [f"* {sentence}." for sentence in order_sentences(found)]
    if on_val := ", ".join(row.name for row in found.rows if row.split == "val"):
        lines.append(f"* Measured on val, on which the checkpoint was chosen too, for want of other images: {on_val}.")
    lines += [f"* {note}" for note in table.notes]
    lines += ["", _markdown_row(["row", "trials", "measured on", "data", "code"]), _markdown_row(["---"] * 5)]
    for row in found.rows:
        if row.trials:
            data = ", ".join(digest[:12] for digest in row.data_hashes)
            cells = [row.name, ", ".join(row.trials), row.split or "-", data, ", ".join(row.commits)]
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
    paper_data = row.entry.group.paper_data
    metrics = {
        key: {
            "data": paper_data if cell.same_data else row.data or None,
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
        "name": row.name,
        "data": row.data or None,
        "metrics": metrics,
        "paper": {"data": paper_data, "metrics": {key: cell.paper for key, cell in row.cells.items()}},
        "seeds": list(row.seeds),
        "trials": list(row.trials),
        "data_hashes": list(row.data_hashes),
        "code_versions": list(row.commits),
        "split": row.split,
        "remark": row.remark,
    }


def _head(column: Column) -> str:
    of = " (full network)" if column.origin == "network" else ""
    return f"{column.label}, {column.unit}{of}"


def _heads(column: Column, compared: bool) -> list[str]:
    return [_head(column), f"paper: {column.label}", *(["difference"] if compared else [])]


def _parts(cell: Cell, compared: bool) -> list[str]:
    return [_ours(cell), _plain(cell.paper), *([_difference(cell)] if compared else [])]


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
