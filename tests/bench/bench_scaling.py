"""A training over 1, 2 and 3 hosts in network namespaces of this machine: steps, start, and the death of a host.

Each host has one CPU worker and the same number of images in each step, so that a step over more hosts would take as
long, were there a core for each, and no exchange. Seconds to the first step are from the start of the command. A host
dies once in each training over several: once it is back at once, once the run continues without it (`--workers 1:N`);
the seconds are from its death to the next step that is done.

    python tests/bench/bench_scaling.py [--hosts 1 2 3] [--json FILE]        (root, iproute2)
    python tests/bench/bench_scaling.py --paper                              (the model on paper, without hosts)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.paper_scaling import table
from spikefleet.tracking.mlflow_client import quiet_mlflow
from spikefleet_pipelines.sources import prepare
from support.cluster_runs import Training
from support.hosts import Cluster, missing, running

_IMAGES = 72
"""Of each worker in a step."""
_EPOCHS = 8
_WARM_UP = 20


def settings(hosts: int) -> tuple[str, ...]:
    return (
        "model.width=0.25",
        "model.timesteps=4",
        f"train.epochs={_EPOCHS}",
        f"train.global_batch={_IMAGES * hosts}",
        "tracking.every_steps=1",
        "registry.register_best=false",
    )


def measured(cluster: Cluster, folder: Path, stores: Path, hosts: int, elastic: bool) -> dict[str, float]:
    """Starts a training, lets one of its hosts die where there are several, and returns what was measured."""
    images = int(dict(part.split("=") for part in settings(hosts))["train.global_batch"])
    workers = f"1:{hosts}" if elastic else str(hosts)
    steps = _EPOCHS * (1295 // images)
    run = Training(cluster, folder, stores, workers=workers, settings=settings(hosts), steps=steps)
    began = time.monotonic()
    run.start()
    figures: dict[str, float] = {}
    try:
        run.wait_until(lambda: run.step() >= 1, "the first step", seconds=300)
        figures["first_step_s"] = time.monotonic() - began
        if hosts > 1:
            run.wait_for_step(steps // 2)
            done, before = run.step(), logs(run)
            cluster.workers[-1].die()
            died = time.monotonic()
            run.wait_until(lambda: "is gone" in run.said, "the host is named", seconds=60)
            figures["named_s"] = time.monotonic() - died
            if not elastic:
                cluster.mend()
                figures["host_back_s"] = time.monotonic() - died
            run.wait_until(lambda: any(map(steps_of, logs(run) - before)), "a step after it", seconds=300)
            figures["next_step_s"] = time.monotonic() - died
            figures["steps_done_again"] = (
                done + 1 - min(min(steps_of(path), default=done + 1) for path in logs(run) - before)
            )
        run.finish(seconds=600)
        figures["command_s"] = time.monotonic() - began
    finally:
        run.end()
        cluster.mend()
    figures["step_ms"] = step_ms(run, images, steps // 2)
    return figures


def logs(run: Training) -> set[Path]:
    """The files of events; each group's rank 0 has its own."""
    return set(run.run_dir.glob("ray/*/events-*.jsonl"))


def steps_of(path: Path) -> list[int]:
    """The steps in a file of events; none if its attempt has ended."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if '"StepDone"' in line and line.endswith("}")]


def step_ms(run: Training, images: int, until: int) -> float:
    """Median of a step with its share of loading, before any fault."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.runs_dir}/mlflow.db")
    experiment = client.get_experiment_by_name(run.recipe)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    rates = {one.step: one.value for one in client.get_metric_history(found.info.run_id, "images_per_second")}
    return 1000 * statistics.median(images / rate for step, rate in rates.items() if _WARM_UP <= step <= until)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 3], help="numbers of hosts")
    parser.add_argument("--paper", action="store_true", help="print the model on paper alone")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.paper:
        print(table())
        return
    if (reason := missing()) is not None:
        print(f"not measured: {reason}")
        return
    quiet_mlflow()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prepare("digits", None, root / "stores" / "digits")
        for hosts in options.hosts:
            folder = root / f"{hosts}"
            folder.mkdir()
            (folder / "cluster").mkdir()
            with running(folder / "cluster", hosts) as cluster:
                for elastic in (False, True) if hosts > 1 else (False,):
                    name = f"{hosts} hosts{', elastic' if elastic else ''}"
                    runs = folder / f"runs-{elastic}"
                    runs.mkdir()
                    figures[name] = measured(cluster, runs, root / "stores", hosts, elastic)
                    load = os.getloadavg()[0]
                    shown = ", ".join(f"{key} {value:.1f}" for key, value in figures[name].items())
                    print(f"{name}: {shown} (load {load:.1f})", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
