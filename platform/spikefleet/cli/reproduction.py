"""reproduce, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from spikefleet.cli.app import (
    Address,
    CpusPerWorker,
    GpusPerWorker,
    RunsDir,
    StoresDir,
    TrialWorkers,
    Verbose,
    app,
    console,
)
from spikefleet.cli.training import Overrides
from spikefleet.cli.tuning import resumable, split_overrides
from spikefleet.reproduction.table import Scale


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help="Name of a paper's table (`spikefleet tables`).")],
    overrides: Overrides = None,
    scale: Annotated[
        Scale, typer.Option(help="full: the paper's networks and data; the others stand for it on two CPU cores.")
    ] = "digits",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each row, with one seed after the other.")] = 3,
    only: Annotated[str, typer.Option(help="Rows whose name (or 'GROUP: NAME') matches this pattern.")] = "*",
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing; report what is there.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed trainings again, once.")] = False,
    workers: TrialWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    address: Address = None,
    verbose: Verbose = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Reproduce a table of a paper: train its rows with several seeds, and set ours beside the paper's figures.

    Rows that are trained already are not trained again, whichever table they were trained for.
    """
    from spikefleet.reproduction.report import REPORT, as_table, order_sentences, remarks, write_reproduction
    from spikefleet.reproduction.reproduce import ReproductionPlan, reproduce, track_reproduction
    from spikefleet.reproduction.table import load_table
    from spikefleet.runs.options import Options

    fixed, data = split_overrides(overrides or [])
    given = {"workers": workers, "cpus_per_worker": cpus_per_worker, "gpus_per_worker": gpus_per_worker}
    changed = {key: value for key, value in given.items() if value is not None}
    plan = ReproductionPlan(
        load_table(table), scale, seeds, only, fixed, changed, retry_failed=retry_failed, train=not report_only
    )
    options = Options(runs_dir, stores_dir, address, verbose, data)
    with resumable():
        found = reproduce(plan, options, console)
    folder = runs_dir / "reproductions" / found.name
    paths = write_reproduction(found, folder)
    track_reproduction(found, paths, folder, runs_dir)
    console.print(as_table(found))
    for sentence in (*remarks(found), *order_sentences(found)):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    console.print(f"report: {folder / REPORT}", highlight=False, soft_wrap=True)


@app.command()
def tables() -> None:
    """List the papers' tables that can be reproduced."""
    from spikefleet.reproduction.table import list_tables, load_table

    listed = Table()
    listed.add_column("table", no_wrap=True)
    for title in ("what it shows", "rows", "scales"):
        listed.add_column(title)
    for name in list_tables():
        found = load_table(name)
        scales = dict.fromkeys(scale for group in found.groups for scale in group.scales)
        what = f"{found.title} ({found.paper})"
        listed.add_row(name, what, str(len(list(found.entries()))), ", ".join(sorted(scales)))
    console.print(listed)
