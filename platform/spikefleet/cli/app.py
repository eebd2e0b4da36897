"""The application and how its errors reach the user: one sentence, no traceback."""

from __future__ import annotations

import gc
import logging
import platform
import sys
import warnings
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from spikefleet.cli.output import say, stderr
from spikefleet.disks import disk_problem, path_problem
from spikefleet.errors import RunError, UserError
from spikefleet.plugins import load_plugins
from spikefleet.status import print_whole
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_tune.interruption import handling, interruption, raise_interrupted

_SHOWN_VERSIONS = ("torch", "ray", "mlflow")
_ORDER = (
    *("recipes", "config", "data", "train", "evaluate", "predict", "inspect", "spike-check", "energy", "gradients"),
    *("batch-size", "lr-range", "convert"),
    *("searches", "tune", "tables", "reproduce", "evidence", "registry", "retrain", "retrain-job"),
    *("submit", "status", "logs", "stop", "tracking", "ui", "doctor"),
)
"""Of the commands, in the help."""


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

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which a newcomer needs them."""
        known = super().list_commands(ctx)
        return sorted(known, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Its help without the line breaks of the source, which typer keeps after the first paragraph."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:
            command.help = "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n"))
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            with handling(raise_interrupted):
                done = super().invoke(ctx)
            if "triton" not in sys.modules:  # which complains at exit of what was not collected
                gc.freeze()  # else the exit looks through all objects of torch, for a second and more
            return done
        except typer.BadParameter as error:
            error.message = _plain_message(error)
            raise
        except (UserError, StoreError, SourceError) as error:
            _complain(str(error))
            raise typer.Exit(2) from None
        except RunError as error:
            _complain(str(error))
            raise typer.Exit(1) from None
        except (OSError, RuntimeError) as error:
            sentence = disk_problem(error) or path_problem(error)
            if sentence is None:
                raise
            _complain(sentence)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            raise typer.Exit(interruption(error).exit_code) from None


def _plain_message(error: typer.BadParameter) -> str:
    """What is wrong with an argument, in the words of the other messages: the value, and what is allowed."""
    from pydantic import ValidationError

    from spikefleet.config.messages import rule_of

    if not isinstance(cause := error.__cause__, ValidationError):
        return error.message
    first = cause.errors()[0]
    rule, shown = rule_of(first["msg"]).removesuffix("."), repr(first["input"])
    return rule if rule.startswith(shown) else f"{shown}: {rule}"


def _complain(sentence: str) -> None:
    stderr.print("error:", style="bold red", end=" ")
    print_whole(stderr, sentence)


app = typer.Typer(
    cls=SentenceGroup,
    name="spikefleet",
    help="Distributed training of spiking neural networks for vision.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _print_versions(wanted: bool) -> None:
    """Versions as they are installed: nothing of it is imported."""
    if not wanted:
        return
    say(f"spikefleet {_installed('spikefleet')}")
    say(f"python {platform.python_version()}")
    for name in _SHOWN_VERSIONS:
        say(f"{name} {_installed(name)}")
    raise typer.Exit


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"


@app.callback()
def prepare(
    plugin: Annotated[
        list[str] | None,
        typer.Option(help="Module that registers model families, tasks or sources; also by SPIKEFLEET_PLUGINS."),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions of spikefleet, Python, torch, Ray and MLflow.",
        ),
    ] = False,
) -> None:
    """Distributed training of spiking neural networks for vision."""
    load_plugins(plugin or ())
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
