"""reproduce, tables, evidence."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from spikefleet.cli.app import app
from spikefleet.cli.completion import table_names
from spikefleet.cli.output import console, loading, messages, print_json, say
from spikefleet.cli.parameters import (
    Address,
    AsJson,
    Autoscaling,
    CpusPerWorker,
    Force,
    GpusPerWorker,
    Overrides,
    RunsDir,
    StoresDir,
    TrialWorkers,
    Verbose,
)
from spikefleet.cli.tables import number, print_table, text
from spikefleet.cli.tuning import resumable, split_overrides
from spikefleet.errors import UserError
from spikefleet.outputs import check_outputs, check_place
from spikefleet.reproduction.scales import Scale
from spikefleet.status import waiting


@app.command()
def reproduce(
    table: Annotated[
        str, typer.Argument(help="Name of a paper's table (`spikefleet tables`).", autocompletion=table_names)
    ],
    overrides: Overrides = None,
    scale: Annotated[
        Scale | None,
        typer.Option(
            help="full: the paper's networks and data; the others stand for it on two CPU cores. By default the "
            "table's smallest (`spikefleet tables`)."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each row, with one seed after the other.")] = 3,
    only: Annotated[str, typer.Option(help="Rows whose name (or 'GROUP: NAME') matches this pattern.")] = "*",
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing; report what is there.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed trainings again, once.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Directory of recorded results, a Parquet file for each recipe and scale: trainings in it are not run "
            "again, though their runs are elsewhere, and new ones are added after each recipe."
        ),
    ] = None,
    workers: TrialWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    autoscaling: Autoscaling = False,
    address: Address = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Reproduce a table of a paper: train its rows with several seeds, and set ours beside the paper's metrics.

    A row names the data set that it was trained on; a difference is formed only where that is the paper's. Rows that
    are trained already are not trained again, whichever table they were trained for.
    """
    from spikefleet.reproduction.table import load_table

    fixed, data = split_overrides(overrides or [])
    chosen = load_table(table)
    at = chosen.scale(scale)
    where = messages(as_json)
    with loading("torch and Ray", where):
        from spikefleet.reproduction.plan import ReproductionPlan
        from spikefleet.reproduction.report import (
            REPORT,
            as_data,
            as_table,
            order_sentences,
            remarks,
            write_reproduction,
        )
        from spikefleet.reproduction.reproduce import reproduce, track_reproduction
        from spikefleet.runs.options import Options

    given = {
        "workers": workers,
        "cpus_per_worker": cpus_per_worker,
        "gpus_per_worker": gpus_per_worker,
        "autoscaling": autoscaling or None,
    }
    changed = {key: value for key, value in given.items() if value is not None}
    if results is not None:
        check_place(results, "--results")
    plan = ReproductionPlan(
        chosen, at, seeds, only, fixed, changed, retry_failed=retry_failed, train=not report_only, results=results
    )
    options = Options(runs_dir, stores_dir, address, verbose, data)
    with resumable():
        found = reproduce(plan, options, where)
    folder = runs_dir / "reproductions" / found.name
    with waiting(where, "writing the report") as announce:
        paths = write_reproduction(found, folder)
        announce("sending the report to MLflow")
        track_reproduction(found, paths, folder, runs_dir)
    if as_json:
        print_json({**as_data(found), "report": str(folder / REPORT)})
        return
    header, *rows = as_table(found)
    title = f"{chosen.paper}; scale {at}"
    columns = [text(name) if name in ("row", "paper's data") else number(name) for name in header]
    print_table(console, columns, rows, title)
    for sentence in (*remarks(found), *order_sentences(found)):
        say(sentence)
    say(f"report: {folder / REPORT}")


@app.command()
def tables(as_json: AsJson = False) -> None:
    """List the papers' tables that can be reproduced."""
    from spikefleet.reproduction.table import list_tables, load_table

    found = [load_table(name) for name in list_tables()]
    rows = [(one, len(list(one.entries())), list(one.scales)) for one in found]
    if as_json:
        print_json(
            [
                {"table": one.name, "title": one.title, "paper": one.paper, "rows": count, "scales": scales}
                for one, count, scales in rows
            ]
        )
        return
    cells = [(one.name, f"{one.title} ({one.paper})", str(count), ", ".join(scales)) for one, count, scales in rows]
    print_table(console, ["table", text("what it shows"), number("rows"), text("scales")], cells)


@app.command()
def evidence(
    results: Annotated[
        Path | None,
        typer.Option(
            help="Directory of recorded results (`reproduce --results`, `tune --results`). By default those that come "
            "with the package."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page, in Markdown.")] = Path("EVIDENCE.md"),
    plots: Annotated[
        Path | None, typer.Option(help="Directory of its plots. By default `evidence`, beside the page.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Say what holds of the papers' claims: a page with verdicts, intervals and plots from recorded results.

    Trains nothing. Each claim compares rows of a table over seeds; what was not run is listed with its command.
    """
    check_outputs([out], inputs=[] if results is None else [results], force=force)
    with loading("torch", messages(as_json)):
        from spikefleet.reproduction.evidence_page import SHIPPED, Evidence, as_verdicts, plots_of, write_evidence
        from spikefleet.reproduction.front_section import front_verdict
        from spikefleet.reproduction.results import shipped_results

    if results is not None and not results.is_dir():
        raise UserError(f"--results {results} is not a directory; record results by `spikefleet reproduce --results`")
    place = out.parent / "evidence" if plots is None else plots
    check_place(place, "--plots")
    read_from = shipped_results() if results is None else results
    found = Evidence.read(read_from)
    check_outputs(plots_of(found, place), inputs=[read_from], force=force, option="--plots")
    words = ["spikefleet", "evidence"] + (["--results", str(results)] if results is not None else [])
    words += (["--out", str(out)] if out != Path("EVIDENCE.md") else []) + (["--plots", str(plots)] if plots else [])
    drawn = write_evidence(found, out, place, shlex.join(words), SHIPPED if results is None else str(results))
    verdicts = as_verdicts(found.tables)
    if as_json:
        fronts = [front_verdict(one) for one in found.searches]
        print_json({"page": str(out), "plots": [str(path) for path in drawn], "verdicts": verdicts, "fronts": fronts})
        return
    rows = [(one["table"], one["scale"], one["claim"], one["verdict"]) for one in verdicts if one["run"]]
    if rows:
        print_table(console, ["table", "scale", text("claim"), "verdict"], rows)
    else:
        say("no training is recorded yet")
    say(f"page: {out}")
