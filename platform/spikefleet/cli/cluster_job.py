"""retrain-job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spikefleet.cli.app import app
from spikefleet.cli.output import console, stderr
from spikefleet.status import print_line


@app.command("retrain-job")
def retrain_job(
    template: Annotated[Path, typer.Option(help="YAML file with the RayJob to create, of the name retrain-MODEL.")],
    namespace: Annotated[str | None, typer.Option(help="Where to create it; the pod's own if not given.")] = None,
    api_server: Annotated[
        str | None, typer.Option(help="Kubernetes API server, https://HOST:PORT; the pod's own if not given.")
    ] = None,
) -> None:
    """Create the RayJob of a retraining on Kubernetes and follow it to its end; for the pod of a CronJob.

    Skipped, with exit code 0, if one of its name has not ended; one that has is deleted first. The exit code is that of
    the job: 0 if it succeeded, 1 if it failed. When this command is stopped, the job keeps running.
    """
    from spikefleet.retraining import rayjob
    from spikefleet.retraining.kubernetes_api import in_this_pod

    def say(line: str) -> None:
        print_line(console, line)
        console.file.flush()

    jobs = in_this_pod(api_server, namespace)
    retrainer = rayjob.Retrainer(jobs, rayjob.read_template(template, jobs.namespace), say, rayjob.POLL_S)
    try:
        say(retrainer.run())
    except KeyboardInterrupt:
        left = (
            f"RayJob {retrainer.name} keeps running" if retrainer.created else "no RayJob is known to have been created"
        )
        print_line(stderr, f"interrupted: no longer following; {left}")
        raise
