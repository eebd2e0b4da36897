"""tune, searches."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikefleet.cli.app import app
from spikefleet.cli.completion import search_names
from spikefleet.cli.output import console, loading, messages, print_json, say, stderr
from spikefleet.cli.parameters import (
    Address,
    AsJson,
    Autoscaling,
    CpusPerWorker,
    GpusPerWorker,
    Overrides,
    RunsDir,
    StoresDir,
    TrialWorkers,
    Verbose,
)
from spikefleet.cli.tables import Column, number, print_table, text
from spikefleet.errors import UserError
from spikefleet.outputs import check_place
from spikefleet.status import print_line, print_whole
from spikefleet_tune.messages import counted

if TYPE_CHECKING:
    from spikefleet.registry import Promotion
    from spikefleet.runs.options import Options
    from spikefleet_tune.search_file import Search

_WHERE_DATA_LIE = ("data.root", "data.store", "data.check_content", "data.loader_processes")


def split_overrides(texts: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides that decide what is learnt, and those that only say where data lie and how they are loaded."""
    from spikefleet.config.recipes import parse_overrides

    overrides = parse_overrides(texts)
    data = {key: value for key, value in overrides.items() if key in _WHERE_DATA_LIE}
    return {key: value for key, value in overrides.items() if key not in data}, data


@contextmanager
def resumable(extended: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Prints the command to resume with when it is interrupted: without --extend, where the extension is noted."""
    try:
        yield
    except KeyboardInterrupt:
        words = sys.argv[1:]
        if extended():
            words = _without(words, "--extend")
        print_whole(stderr, f"interrupted; resume with: spikefleet {shlex.join(words)}")
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
    search: Annotated[
        str,
        typer.Argument(
            help="Name of a search (`spikefleet searches`) or path of a YAML file.", autocompletion=search_names
        ),
    ],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of this search's directory; the same name resumes where it stopped.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Budget of trials instead of the file's.")] = None,
    hours: Annotated[float | None, typer.Option(help="Budget of hours instead of the file's.")] = None,
    objectives: Annotated[
        str | None,
        typer.Option(help="Instead of the file's, such as top1,energy_mj,latency_ms; with a direction map50:max."),
    ] = None,
    extend: Annotated[int, typer.Option(min=0, help="Add so many trials to a search that is done.")] = 0,
    warm_start: Annotated[str | None, typer.Option(help="Begin with what this earlier search has found.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say how long it takes on this machine, from a few steps; start nothing.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed trials again, once.")] = False,
    confirm: Annotated[int, typer.Option(min=0, help="Train each member of the front with so many other seeds.")] = 0,
    confirm_all: Annotated[
        bool, typer.Option("--confirm-all", help="With --confirm: each trial, not only those of the front.")
    ] = False,
    register: Annotated[
        str | None,
        typer.Option(help="Register a trial: knee, best (both by the other seeds of --confirm, if any), or its name."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Directory in which the search is recorded for `spikefleet evidence`.")
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
    """Search over configurations; each trial is a training. The same command resumes an interrupted search."""
    fixed, data = split_overrides(overrides or [])
    resources: dict[str, Any] = {
        "workers": workers,
        "cpus_per_worker": cpus_per_worker,
        "gpus_per_worker": gpus_per_worker,
        "autoscaling": autoscaling or None,
    }
    changes = {"overrides": fixed, "budget": {"trials": trials, "hours": hours}, "resources": resources}
    wanted = wanted_search(search, changes, objectives)
    where = messages(as_json)
    with loading("torch and Ray", where):
        from spikefleet.runs.options import Options
        from spikefleet.search.run_search import (
            chosen_trial,
            confirm_trials,
            confirmed_choice,
            extension_of,
            register_trial,
            report_of,
            run_tracked_search,
        )
        from spikefleet_tune.report import pareto_rows, pareto_table

    name = name or Path(search).stem
    if register is not None and register not in ("knee", "best") and not register.startswith(f"{name}-"):
        raise UserError(f"--register {register!r} must be knee, best or the name of a trial, such as {name}-0000")
    if confirm_all and not confirm:
        raise UserError("--confirm-all says which trials --confirm trains again; give --confirm a number of seeds")
    if results is not None:
        check_place(results, "--results")
    options = Options(runs_dir, stores_dir, address, verbose, data)
    if plan:
        given = {
            "--extend": extend,
            "--warm-start": warm_start,
            "--retry-failed": retry_failed,
            "--confirm": confirm,
            "--register": register,
            "--results": results,
        }
        if unused := [option for option, value in given.items() if value]:
            raise UserError(
                f"--plan starts nothing, so {' and '.join(unused)} would have no effect; leave out one of both"
            )
        _plan(wanted, name, options, as_json)
        return
    extended = extension_of(name, options)
    rows: list[dict[str, Any]] = []
    with resumable(lambda: extension_of(name, options) > extended):
        result = run_tracked_search(
            wanted, name, options, where, extend=extend, warm_start=warm_start, retry_failed=retry_failed
        )
        if not as_json:
            header, *cells = pareto_table(result)
            title = f"{result.name}: {len(result.front)} of {counted(len(result.records), 'trial')} on the front"
            columns = [Column(head, "number" if head.endswith(")") else "name") for head in header]
            print_table(console, columns, cells, title)
        if confirm:
            rows = confirm_trials(result, confirm, options, where, everyone=confirm_all, retry_failed=retry_failed)
            if not as_json:
                _print_confirmation(rows, list(result.search.objectives))
    if register is not None and (trial := confirmed_choice(result, rows, register)) != register:
        print_line(where, f"{register} by the other seeds: trial {trial}")
        register = trial
    promotion = None if register is None else register_trial(result, register, options, where)
    if results is not None:
        from spikefleet.reproduction.recorded_search import RecordedSearch

        registered = None if promotion is None else (chosen_trial(result, register or "").name, promotion)
        chosen = [word for word in overrides or [] if word.partition("=")[0] not in _WHERE_DATA_LIE]
        recorded = RecordedSearch.of(result, [search, *chosen], options, rows, registered).write(results)
        print_line(where, f"recorded {counted(len(result.records), 'trial')} in {recorded}")
    if as_json:
        print_json(
            {
                "search": result.name,
                "complete": result.complete,
                "trials": len(result.records),
                "objectives": dict(result.search.objectives),
                "front": pareto_rows(result),
                "confirmation": rows or None,
                "report": str(report_of(result)),
                "registered": _as_data(promotion),
            }
        )
        return
    _print_importance(report_of(result))
    say(f"report: {report_of(result)}")
    if promotion is not None:
        say(f"{promotion.name} version {promotion.version} is {promotion.alias or 'without alias'}: {promotion.reason}")


def wanted_search(search: str, changes: dict[str, dict[str, Any]], objectives: str | None = None) -> Search:
    """A search with the values that the command gives instead of the file's. Raises UserError."""
    from spikefleet.search.search_files import load_search, objectives_of
    from spikefleet_tune.errors import SearchError
    from spikefleet_tune.search_file import search_of

    try:
        tree = load_search(search).dump()
        for section, values in changes.items():
            tree[section] = {**tree[section], **{key: value for key, value in values.items() if value is not None}}
        if objectives is not None:
            tree["objectives"] = objectives_of(objectives)
        return search_of(tree, f"search {search}")
    except SearchError as error:
        raise UserError(str(error)) from None


def _plan(wanted: Search, name: str, options: Options, as_json: bool) -> None:
    from spikefleet.search.planning import plan_search

    plan = plan_search(wanted, name, options, stderr)
    if as_json:
        print_json({"search": name, **plan.to_dict()})
        return
    for which, one in (("smallest", plan.smallest), ("largest", plan.largest)):
        point = ", ".join(f"{key}={value}" for key, value in one.point.items())
        say(
            f"{which} trial ({point}): {1000 * one.step_s:.4g} ms a step, {one.steps:,} steps and "
            f"{counted(one.epochs, 'evaluation')} of {one.evaluation_s:.3g} s: {_duration(one.seconds)}"
        )
    say(f"measured on {plan.device}; {counted(plan.at_a_time, 'trial')} at a time fit into this machine")
    early = ", less where trials are stopped early" if plan.stops_early else ""
    if plan.seconds is None:
        say(f"search {name} runs for its {plan.hours:g} hours: its budget has no number of trials")
        return
    low, high = map(_duration, plan.seconds)
    hours = "" if plan.hours is None else f", at most the budget of {plan.hours:g} hours"
    trials = counted(plan.trials or 0, "trial")
    say(f"search {name}: {trials} take {low} to {high}{hours}{early}; start, report and energy of trials come on top")


def _duration(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print_importance(report: Path) -> None:
    """What decides each objective, with its interval, as the report has it."""
    from spikefleet.files import read_json

    found = read_json(report / "results.json")
    for name, shares in found["importance"].items():
        if isinstance(shares, str):
            say(f"importance for {name}: {shares}")
            continue
        intervals = found["importance_intervals"][name]
        words = []
        for key, share in shares.items():
            low, high = intervals.get(key, (share, share))
            words.append(f"{key} {share:.0%} ({low:.0%} to {high:.0%})")
        say(f"importance for {name}: {', '.join(words)}")
    if any(not isinstance(shares, str) for shares in found["importance"].values()):
        say(f"importance by {found['importance_method']}")


def _as_data(promotion: Promotion | None) -> dict[str, Any] | None:
    if promotion is None:
        return None
    return {
        "name": promotion.name,
        "version": promotion.version,
        "alias": promotion.alias,
        "reason": promotion.reason,
    }


def _print_confirmation(rows: list[dict[str, Any]], objectives: list[str]) -> None:
    cells = []
    for row in rows:
        shown = []
        for name in objectives:
            metric = row[name]
            spread = "" if metric["std"] is None else f" ± {metric['std']:.2g}"
            mean = "-" if metric["mean"] is None else f"{metric['mean']:.5g}"
            shown.append(f"{mean}{spread} ({metric['search']:.5g})")
        cells.append((row["trial"], str(row["seeds"]), *shown))
    columns = [number(f"{name}: mean ± std (in the search)") for name in objectives]
    print_table(console, ["trial", number("seeds"), *columns], cells, title="confirmed")


@app.command()
def searches(as_json: AsJson = False) -> None:
    """List the searches that come with spikefleet."""
    from spikefleet.search.search_files import list_searches, load_search

    found = {name: load_search(name) for name in list_searches()}
    if as_json:
        print_json(
            [
                {
                    "search": name,
                    "recipe": search.recipe,
                    "space": list(search.space),
                    "objectives": dict(search.objectives),
                }
                for name, search in found.items()
            ]
        )
        return
    rows = [
        (
            name,
            search.recipe,
            ", ".join(search.space),
            ", ".join(f"{metric} {direction}" for metric, direction in search.objectives.items()),
        )
        for name, search in found.items()
    ]
    print_table(console, ["search", "recipe", text("space"), text("objectives")], rows)
