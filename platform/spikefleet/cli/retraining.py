"""retrain."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spikefleet.cli.app import app
from spikefleet.cli.completion import model_names
from spikefleet.cli.output import loading, messages, print_json, print_json_line, say, stderr
from spikefleet.cli.parameters import Address, AsJson, OtherData, Overrides, RunsDir, StoresDir, Verbose
from spikefleet.errors import UserError
from spikefleet.status import print_line

if TYPE_CHECKING:
    from rich.console import Console

    from spikefleet.retraining.plan import Request
    from spikefleet.retraining.retrain import Retrained
    from spikefleet.runs.options import Options


@app.command()
def retrain(
    model: Annotated[str, typer.Argument(help="Name of a registered model.", autocompletion=model_names)],
    overrides: Overrides = None,
    schedule: Annotated[
        str | None,
        typer.Option(help='Stay, and retrain at these times: five fields of cron, for example "0 3 * * 1".'),
    ] = None,
    timezone: Annotated[str, typer.Option(help="Time zone of --schedule, such as Europe/Berlin.")] = "UTC",
    start: Annotated[
        Literal["scratch", "champion"], typer.Option("--from", help="Weights that the training starts from.")
    ] = "scratch",
    data: OtherData = None,
    force: Annotated[bool, typer.Option("--force", help="Retrain although nothing changed.")] = False,
    wait: Annotated[
        float,
        typer.Option(
            min=0, help="Minutes to wait for a retraining of the model that runs elsewhere, before this one is skipped."
        ),
    ] = 0.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and why; train and register nothing.")
    ] = False,
    address: Address = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Train a registered model anew if data, configuration or code changed, and promote it if it passes the gates.

    Candidate and champion are compared on the images of retrain.gate_store; the same command resumes a retraining that
    was interrupted. The last line says how it ended: promoted, kept, skipped or nothing new (exit code 0 each).
    """
    from spikefleet.config.recipes import parse_overrides

    wanted = parse_overrides(overrides or [])
    if schedule is None and timezone != "UTC":
        raise UserError(f"--timezone={timezone} has no effect without --schedule; add it, or leave it out")
    if schedule is not None:
        from spikefleet.retraining.schedule import next_time

        next_time(schedule, timezone)  # what is wrong is said before torch is loaded
    where = messages(as_json)
    with loading("torch", where):
        from spikefleet.retraining.plan import Request
        from spikefleet.retraining.retrain import retrain as retrain_model
        from spikefleet.retraining.schedule import run_on_schedule
        from spikefleet.runs.options import Options
    request = Request(model, wanted, start, data, force, wait * 60)
    options = Options(runs_dir, stores_dir, address, verbose)
    if dry_run:
        _print_plan(request, options, where, as_json, schedule, timezone)
        return

    def once(due: datetime | None = None) -> None:
        _print_outcome(retrain_model(request, options, where), as_json, line=due is not None)

    try:
        if schedule is None:
            once()
        else:
            run_on_schedule(schedule, timezone, once, where)
    except KeyboardInterrupt:
        print_line(stderr, "interrupted; the same command resumes the retraining")
        raise


def _print_plan(
    request: Request, options: Options, where: Console, as_json: bool, schedule: str | None, timezone: str
) -> None:
    from spikefleet.gates.gate_store import MAKE_ONE
    from spikefleet.retraining.plan import plan_retraining
    from spikefleet.retraining.schedule import next_time, shown
    from spikefleet.tracking.mlflow_client import resolve_tracking_uri

    plan = plan_retraining(request, options, where, resolve_tracking_uri(options.runs_dir))
    due = None if schedule is None else next_time(schedule, timezone)
    gates = plan.config.retrain.gate_store
    if as_json:
        print_json(
            {
                "model": request.model,
                "base": plan.base.uri,
                "champion": plan.champion,
                "reasons": list(plan.reasons),
                "before": None if plan.before is None else plan.before.id,
                "data": {"store": plan.store.location, "content_hash": plan.store.manifest.content_hash},
                "gate_store": gates,
                "seeds": plan.config.retrain.seeds,
                "next": None if due is None else due.isoformat(),
            }
        )
        return
    if due is not None:
        say(f"next retraining at {shown(due)}")
    if not plan.reasons:
        say(f"nothing new: data, configuration and code are those of {plan.base.uri}")
        return
    if plan.before is not None and not request.force:
        say(f"nothing new: {plan.before.id} trained the same and {plan.before.word} it: {plan.before.reason}")
        return
    say(f"would retrain {plan.base.uri} on {plan.store.location}")
    for reason in plan.reasons:
        say(f"because {reason}")
    compared = (
        f"compare it with the champion on {gates}" if gates else f"keep it as challenger: no gate store ({MAKE_ONE})"
    )
    say(f"would {compared}")


def _print_outcome(outcome: Retrained, as_json: bool, *, line: bool) -> None:
    plain: dict[str, Any] = {
        "outcome": outcome.word,
        "reason": outcome.reason,
        "id": outcome.id,
        "candidate": outcome.candidate,
        "report": None if outcome.report is None else str(outcome.report),
    }
    if as_json:
        (print_json_line if line else print_json)(plain)
        return
    if outcome.report is not None:
        say(f"report: {outcome.report}")
    say(f"{outcome.word}: {outcome.reason}")
    sys.stdout.flush()
