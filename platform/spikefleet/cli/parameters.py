"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from spikefleet.cli.completion import network_names, override_keys, recipe_names
from spikefleet.outputs import refuse_uri


def _runs_dir(given: Path) -> Path:
    """Refuses a URI, for every command."""
    refuse_uri(given, "--runs-dir")
    return given


def _stores_dir(given: Path) -> Path:
    """Refuses a URI, for every command."""
    refuse_uri(given, "--stores-dir")
    return given


RunsDir = Annotated[
    Path,
    typer.Option(envvar="SPIKEFLEET_RUNS", callback=_runs_dir, help="Where runs and their tracking database are kept."),
]
StoresDir = Annotated[
    Path, typer.Option(envvar="SPIKEFLEET_STORES", callback=_stores_dir, help="Where prepared data sets are kept.")
]

Address = Annotated[str | None, typer.Option(help="Ray cluster, HOST:PORT; RAY_ADDRESS if not given.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what Ray and its workers log.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, messages on stderr.")]

Autoscaling = Annotated[
    bool, typer.Option("--autoscaling", help="The cluster grows: ask for hosts that are missing, and wait for them.")
]
TrialWorkers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Ray Train workers of each training, instead of the file's.")
]
CpusPerWorker = Annotated[float | None, typer.Option(min=0.01, help="CPUs of each worker, instead of the file's.")]
GpusPerWorker = Annotated[float | None, typer.Option(min=0, help="GPUs of each worker, instead of the file's.")]

Network = Annotated[
    str,
    typer.Argument(help="models:/NAME@champion, models:/NAME/3, a run, or a checkpoint.", autocompletion=network_names),
]
Recipe = Annotated[
    str,
    typer.Argument(help="Name of a recipe (`spikefleet recipes`) or path of a YAML file.", autocompletion=recipe_names),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides, for example model.timesteps=2 optim.lr=0.05.", autocompletion=override_keys),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are at --out.")]
SplitName = Literal["train", "val", "test"]


class SliceOrder(StrEnum):
    """Another order of the time slices of recordings than the recorded one."""

    SHUFFLED = "shuffled"
    REVERSED = "reversed"


WeightPrecision = Literal["fp32", "bf16", "int8"]
"""What the weights of the layers that spikes feed are rounded to."""

OfDeployed = Annotated[
    WeightPrecision | None,
    typer.Option(
        "--precision",
        help="Deploy the network with weights of this precision; spikes are exact in each. If not given, it runs as it "
        "was trained.",
    ),
]

Weights = Annotated[
    WeightPrecision, typer.Option("--precision", help="Weights of the layers that spikes feed, rounded to this type.")
]


OtherData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Another store than the configuration's: a path, a URI or a name in --stores-dir.",
    ),
]
