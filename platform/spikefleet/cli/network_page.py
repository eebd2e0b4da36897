"""inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikefleet.cli.app import app
from spikefleet.cli.output import loading, print_json, say, stderr
from spikefleet.cli.parameters import AsJson, Force, Network, OtherData, RunsDir, SplitName, StoresDir
from spikefleet.errors import UserError
from spikefleet.outputs import check_outputs
from spikefleet.status import print_line, waiting

if TYPE_CHECKING:
    from spikefleet.inference.trained_network import TrainedNetwork


@app.command("inspect")
def inspect_command(
    network: Network,
    split: Annotated[SplitName, typer.Option(help="Part of the data.")] = "test",
    data: OtherData = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the page; that of the run's report, else inspect.html here.")
    ] = None,
    link: Annotated[
        bool | None,
        typer.Option(
            help="Link the page from MLflow: an artifact of the run, a tag of the version. By default, unless --data "
            "is given: a page on other data is not that of the version."
        ),
    ] = None,
    force: Force = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Evaluate on a GPU.")] = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Write one HTML page on a network: what it does well, where it fails, and what it costs.

    Firing rates by layer and time step, accuracy after each step, energy by layer, classes, confusion matrix, worst
    mistakes with their images, calibration, gradient norms and the proof. The page is one file that asks for nothing
    outside.
    """
    with loading("torch", stderr):
        from spikefleet.inference.trained_network import open_trained_network
        from spikefleet.inspection.measuring import expected_calibration_error, inspect_network
        from spikefleet.inspection.page import PAGE, write_page

    with waiting(stderr, f"opening {network}"):
        trained = open_trained_network(network, runs_dir)
    path = out or (trained.report or Path()) / PAGE
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {path} must end in .html")
    check_outputs([path], inputs=trained.folders, force=force)
    inspection = inspect_network(trained, split, stores_dir, stderr, data=data, gpu=gpu)
    with waiting(stderr, "writing the page"):
        write_page(inspection, path)
    wanted = data is None if link is None else link
    linked = _link(trained, path, runs_dir) if wanted else None
    if as_json:
        calibration = inspection.calibration
        print_json(
            {
                "network": network,
                "page": str(path),
                "linked": linked,
                "split": inspection.details["split"],
                "metrics": inspection.details["metrics"],
                "over_time": list(inspection.evaluation.over_time),
                "expected_calibration_error": calibration and expected_calibration_error(calibration),
                "energy_mj": inspection.energy.energy_mj,
                "mistakes": [one.row for one, _ in inspection.mistakes],
            }
        )
        return
    if linked is not None:
        say(f"MLflow: {linked}")
    say(f"page: {path}")


def _link(trained: TrainedNetwork, page: Path, runs_dir: Path) -> str | None:
    """Links a page from MLflow; a registry that fails is named, and the page is there."""
    from spikefleet.inspection.links import link_run, link_version
    from spikefleet.runs.run_dir import Run
    from spikefleet.tracking.mlflow_client import resolve_tracking_uri

    try:
        with waiting(stderr, "linking the page from MLflow"):
            if trained.reference.startswith("models:"):
                return link_version(trained.reference, page, resolve_tracking_uri(runs_dir))
            if trained.report is not None:
                return link_run(Run(trained.report.parent), page, resolve_tracking_uri(runs_dir))
    except UserError as error:
        print_line(stderr, f"the page is not linked from MLflow: {error}")
    return None
