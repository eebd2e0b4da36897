"""A training over 1, 2 and 3 hosts in network namespaces of this machine: steps, start, and the death of a host.

Each host has one CPU worker and the same number of images in each step, and each training as many steps. A step over
more hosts would take as long, were there a core for each, and no exchange. Seconds to the first step are from the start
of the command. A host dies once in each training over several: once it is back at once, once the run continues without
it (`--workers 1:N`); the seconds are from its death to the next step that is done. Ray looks after its hosts each
second here (`support.hosts`), not every three.

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
from spikefleet_tune.messages import counted
from support.cluster_runs import Training
from support.hosts import Cluster, missing, running

_IMAGES = 72
"""Of each worker in a step."""
_TRAIN_IMAGES = 1295
_STEPS = 144
"""At least so many steps, in whole epochs: half of them before a host dies."""
_WARM_UP = 20
_ROWS = {
    "step_ms": "step, median before a host dies, ms",
    "steps_measured": "steps of that median",
    "first_step_s": "command to first step, s",
    "named_s": "death of a host until it is named, s",
    "host_back_s": "until the host is back, s",
    "next_step_s": "until the next step, s",
    "steps_done_again": "steps done again",
    "command_s": "whole command, s",
}
"""What is measured, in the order of the table."""


def epoch_steps(hosts: int) -> int:
    """Optimizer steps of an epoch; the last batch is smaller."""
    return -(-_TRAIN_IMAGES // (_IMAGES * hosts))


def settings(hosts: int) -> tuple[str, ...]:
    return (
        "model.width=0.25",
        "model.timesteps=4",
        f"train.epochs={-(-_STEPS // epoch_steps(hosts))}",
        f"train.global_batch={_IMAGES * hosts}",
        "tracking.every_steps=1",
        "registry.register_best=false",
    )


def measured(cluster: Cluster, folder: Path, stores: Path, hosts: int, elastic: bool) -> dict[str, float]:
    """Starts a training, lets one of its hosts die where there are several, and returns what was measured."""
    workers = f"1:{hosts}" if elastic else str(hosts)
    steps = -(-_STEPS // epoch_steps(hosts)) * epoch_steps(hosts)
    run = Training(cluster, folder, stores, workers=workers, settings=settings(hosts), steps=steps)
    began = time.monotonic()
    run.start()
    figures: dict[str, float] = {}
    try:
        run.wait_until(lambda: run.step() >= 1, "the first step", seconds=300)
        figures["first_step_s"] = time.monotonic() - began
        if hosts > 1:
            run.wait_for_step(steps // 2 + epoch_steps(hosts) // 2)  # in the middle of an epoch
            before = logs(run)
            cluster.workers[-1].die()
            died, done = time.monotonic(), run.step()
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
    found = steps_ms(run, _IMAGES * hosts, steps // 2)
    figures["step_ms"], figures["steps_measured"] = statistics.median(found), len(found)
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


def steps_ms(run: Training, images: int, until: int) -> list[float]:
    """Each step with its share of loading, before any fault."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.runs_dir}/mlflow.db")
    experiment = client.get_experiment_by_name(run.recipe)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    rates = {one.step: one.value for one in client.get_metric_history(found.info.run_id, "images_per_second")}
    return [1000 * images / rate for step, rate in rates.items() if _WARM_UP <= step <= until]


def as_table(figures: dict[str, dict[str, float]]) -> str:
    """The figures in Markdown: a column for each training."""
    lines = [f"| | {' | '.join(figures)} |", f"|---|{'---|' * len(figures)}"]
    for key, title in _ROWS.items():
        shown = [f"{one[key]:.4g}" if key in one else "" for one in figures.values()]
        lines.append(f"| {title} | {' | '.join(shown)} |")
    return "\n".join(lines)


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
                    name = f"{counted(hosts, 'host')}{', elastic' if elastic else ''}"
                    runs = folder / f"runs-{elastic}"
                    runs.mkdir()
                    figures[name] = measured(cluster, runs, root / "stores", hosts, elastic)
                    load = os.getloadavg()[0]
                    shown = ", ".join(f"{key} {value:.1f}" for key, value in figures[name].items())
                    print(f"{name}: {shown} (load {load:.1f})", flush=True)
    print(f"\n{as_table(figures)}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
