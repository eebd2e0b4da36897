"""The application and how its errors reach the user: one sentence, no traceback."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from spikefleet.errors import RunError, UserError
from spikefleet.plugins import load_plugins
from spikefleet_pipelines.errors import SourceError, StoreError

console = Console()
stderr = Console(stderr=True)

RunsDir = Annotated[
    Path, typer.Option(envvar="SPIKEFLEET_RUNS", help="Where runs and their tracking database are kept.")
]
StoresDir = Annotated[Path, typer.Option(envvar="SPIKEFLEET_STORES", help="Where prepared data sets are kept.")]

Address = Annotated[str | None, typer.Option(help="Ray cluster, HOST:PORT; RAY_ADDRESS if not given.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what Ray and its workers log.")]

TrialWorkers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Ray Train workers of each training, instead of the file's.")
]
CpusPerWorker = Annotated[float | None, typer.Option(min=0.01, help="CPUs of each worker, instead of the file's.")]
GpusPerWorker = Annotated[float | None, typer.Option(min=0, help="GPUs of each worker, instead of the file's.")]

Network = Annotated[str, typer.Argument(help="models:/NAME@champion, models:/NAME/3, a run's name or a checkpoint.")]


class SentenceGroup(TyperGroup):
    """Turns what a user can mend into exit code 2 and a failed run into exit code 1."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--plugin` may also follow the command's name."""
        front, rest, words = [], [], iter(args)
        for word in words:
            if word == "--":
                rest += [word, *words]
            elif word == "--plugin":
                front += [word, *([following] if (following := next(words, None)) is not None else [])]
            elif word.startswith("--plugin="):
                front.append(word)
            else:
                rest.append(word)
        return super().parse_args(ctx, [*front, *rest])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, StoreError, SourceError) as error:
            _say(str(error))
            raise typer.Exit(2) from None
        except RunError as error:
            _say(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _say(sentence: str) -> None:
    stderr.print("error:", style="bold red", end=" ")
    stderr.print(sentence, highlight=False, markup=False, soft_wrap=True)


app = typer.Typer(
    cls=SentenceGroup,
    name="spikefleet",
    help="Distributed training of spiking neural networks for vision.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def prepare(
    plugin: Annotated[
        list[str] | None,
        typer.Option(help="Module that registers model families, tasks or sources; also by SPIKEFLEET_PLUGINS."),
    ] = None,
) -> None:
    """Distributed training of spiking neural networks for vision."""
    load_plugins(plugin or ())
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
