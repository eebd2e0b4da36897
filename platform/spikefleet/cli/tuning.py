"""tune, searches."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

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
    stderr,
)
from spikefleet.cli.training import Overrides
from spikefleet.config.recipes import parse_overrides
from spikefleet.errors import UserError

_WHERE_DATA_LIE = ("data.root", "data.store", "data.loader_processes")


def split_overrides(texts: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides that decide what is learnt, and those that only say where data lie and how they are loaded."""
    overrides = parse_overrides(texts)
    data = {key: value for key, value in overrides.items() if key in _WHERE_DATA_LIE}
    return {key: value for key, value in overrides.items() if key not in data}, data


@contextmanager
def resumable(extended: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Prints the command to go on with when it is interrupted: without --extend, where the extension is noted."""
    try:
        yield
    except KeyboardInterrupt:
        words = sys.argv[1:]
        if extended():
            words = _without(words, "--extend")
        stderr.print(
            f"interrupted; this goes on: spikefleet {shlex.join(words)}",
            highlight=False,
            markup=False,
        )
        raise


def _without(words: Sequence[str], option: str) -> list[str]:
    """Words of a command without an option and its value."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == option:
            next(rest, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


@app.command()
def tune(
    search: Annotated[str, typer.Argument(help="Name of a search (`spikefleet searches`) or path of a YAML file.")],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of this search's directory; the same name goes on where it stopped.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Budget of trials instead of the file's.")] = None,
    hours: Annotated[float | None, typer.Option(help="Budget of hours instead of the file's.")] = None,
    extend: Annotated[int, typer.Option(min=0, help="Add so many trials to a search that is done.")] = 0,
    warm_start: Annotated[str | None, typer.Option(help="Begin with what this earlier search has found.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed trials again, once.")] = False,
    confirm: Annotated[int, typer.Option(min=0, help="Train each member of the front with so many other seeds.")] = 0,
    register: Annotated[str | None, typer.Option(help="Register a trial: knee, best, or its name.")] = None,
    workers: TrialWorkers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    address: Address = None,
    verbose: Verbose = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Search over configurations; each trial is a training. The same command goes on with an interrupted search."""
    from spikefleet.runs.options import Options
    from spikefleet.search.run_search import confirm_front, extension_of, register_trial, report_of, run_tracked_search
    from spikefleet.search.search_files import load_search
    from spikefleet_tune.errors import SearchError
    from spikefleet_tune.report import pareto_table
    from spikefleet_tune.search_file import search_of

    fixed, data = split_overrides(overrides or [])
    changes: dict[str, dict[str, Any]] = {
        "overrides": fixed,
        "budget": {"trials": trials, "hours": hours},
        "resources": {
            "workers": workers,
            "cpus_per_worker": cpus_per_worker,
            "gpus_per_worker": gpus_per_worker,
        },
    }
    try:
        tree = load_search(search).dump()
        for section, values in changes.items():
            tree[section] = {**tree[section], **{key: value for key, value in values.items() if value is not None}}
        wanted = search_of(tree, f"search {search}")
    except SearchError as error:
        raise UserError(str(error)) from None
    name = name or Path(search).stem
    options = Options(runs_dir, stores_dir, address, verbose, data)
    extended = extension_of(name, options)
    with resumable(lambda: extension_of(name, options) > extended):
        result = run_tracked_search(
            wanted, name, options, console, extend=extend, warm_start=warm_start, retry_failed=retry_failed
        )
        console.print(pareto_table(result))
        if confirm:
            rows = confirm_front(result, confirm, options, console, retry_failed)
            console.print(_confirmation(rows, list(result.search.objectives)))
    console.print(f"report: {report_of(result)}", highlight=False, soft_wrap=True)
    if register is not None:
        promotion = register_trial(result, register, options, console)
        console.print(f"{promotion.name} version {promotion.version} is {promotion.alias}: {promotion.reason}")


def _confirmation(rows: list[dict[str, Any]], objectives: list[str]) -> Table:
    table = Table("trial", "seeds", *(f"{name}: mean ± std (in the search)" for name in objectives), title="confirmed")
    for row in rows:
        cells = []
        for name in objectives:
            figures = row[name]
            spread = "" if figures["std"] is None else f" ± {figures['std']:.2g}"
            mean = "-" if figures["mean"] is None else f"{figures['mean']:.5g}"
            cells.append(f"{mean}{spread} ({figures['search']:.5g})")
        table.add_row(row["trial"], str(row["seeds"]), *cells)
    return table


@app.command()
def searches() -> None:
    """List the searches that come with spikefleet."""
    from spikefleet.search.search_files import load_search
    from spikefleet_tune.search_file import list_searches

    table = Table("search", "recipe", "space", "objectives")
    for name in list_searches():
        found = load_search(name)
        goals = ", ".join(f"{metric} {direction}" for metric, direction in found.objectives.items())
        table.add_row(name, found.recipe, ", ".join(found.space), goals)
    console.print(table)
