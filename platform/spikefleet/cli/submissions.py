"""Checks a command that is to be submitted, as far as this machine can, before a job is made of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer.main

from spikefleet.cli.app import app
from spikefleet.cli.data import check_source
from spikefleet.cli.tuning import split_overrides, wanted_search
from spikefleet.errors import UserError
from spikefleet.jobs.submission import Submission, refuse_relative, refuse_secrets
from spikefleet.plugins import loaded_plugins

if TYPE_CHECKING:
    from spikefleet.config.schema import Config

Values = dict[str, Any]
"""Arguments and options of a command, by the names of its parameters."""

_YAML = (".yaml", ".yml")

_PLACES = ("runs_dir", "stores_dir", "results", "out")
"""Options with a path."""
_PATHS = ("data.root", "data.store")
"""Overrides with a path."""


def checked(words: Sequence[str], code: Path | None) -> Submission:
    """The submission of a command.

    Args:
        words: as typed after `spikefleet`.
        code: directory that is sent with it.

    Raises:
        UserError: the command cannot be submitted, or is wrong.
        typer.BadParameter: an option is wrong, as the command itself says it.
    """
    kind, rest = _split(words)
    refuse_secrets(rest)
    values = _parsed(kind, rest)
    refuse_relative({f"--{name.replace('_', '-')}": values.get(name) for name in _given(rest, values)})
    run, digest, recipe, added = _KINDS[kind](values)
    file = next((values[name] for name in ("recipe", "search") if Path(str(values.get(name))).suffix in _YAML), None)
    if file is not None:
        rest = [_inside(code, file) if word == file else word for word in rest]
    plugins = [word for module in loaded_plugins() for word in ("--plugin", module)]
    command = (
        (*plugins, *kind.split("-", 1), *rest, *added) if kind == "data-prepare" else (*plugins, kind, *rest, *added)
    )
    return Submission(kind, run, command, digest or _digest(rest), recipe, code)


def _split(words: Sequence[str]) -> tuple[str, list[str]]:
    kind, *rest = words
    if kind == "data" and rest and rest[0] == "prepare":
        return "data-prepare", rest[1:]
    if kind not in _KINDS or kind == "data-prepare":
        known = ", ".join(name.replace("-", " ", 1) for name in _KINDS)
        raise UserError(f"{kind!r} cannot be submitted; expected one of {known}")
    return kind, rest


def _parsed(kind: str, words: list[str]) -> Values:
    """Arguments and options, checked by the command's own declaration."""
    command: Any = typer.main.get_command(app)
    for name in ("data", "prepare") if kind == "data-prepare" else (kind,):
        command = command.commands[name]
    context = command.make_context(f"spikefleet {kind.replace('-', ' ', 1)}", list(words))
    return dict(context.params)


def _given(words: Sequence[str], values: Values) -> list[str]:
    """Options with a path that were typed, and do not come from this machine's environment."""
    names = [name for name in _PLACES if f"--{name.replace('_', '-')}" in " ".join(words)]
    return [name for name in names if values.get(name) is not None]


def _inside(code: Path | None, file: str) -> str:
    """The path of a file in the job's working directory."""
    if code is not None and Path(file).resolve().is_relative_to(code.resolve()):
        return str(Path(file).resolve().relative_to(code.resolve()))
    where = "" if code is None else f", which is not below {code}"
    raise UserError(
        f"{file} is a file of this machine{where}; send it with its directory: --with-code {Path(file).parent or '.'}"
    )


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()


def _paths_among(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides with a path."""
    return {key: overrides.get(key) for key in _PATHS}


def _unless_named(given: Mapping[str, str | None]) -> dict[str, str | None]:
    """Those that are a path or a URI, and no plain name, which the cluster looks up."""
    return {name: value for name, value in given.items() if value is not None and "/" in value}


Checked = tuple[str, str, str, list[str]]
"""Run, digest (empty: that of the words), recipe, and words to add."""


def _train(values: Values) -> Checked:
    from spikefleet.config.recipes import load_config, parse_overrides, with_cluster
    from spikefleet.runs.run_dir import check_run_name, default_run_name

    overrides = parse_overrides(values["overrides"] or [])
    refuse_relative(_paths_among(overrides))
    if values["resume"] is not None:
        return check_run_name(values["resume"]), "", values["recipe"], []
    config: Config = load_config(values["recipe"], with_cluster(overrides, values["workers"], values["gpu"]))
    if config.cluster.workers == 0:
        raise UserError(
            "--workers 0 trains without Ray, in the job's own process on the head; set --workers to 1 or more"
        )
    if (source := config.init.source) is not None:
        if source.endswith(".safetensors"):
            refuse_relative({"init.from": source})
        if values["name"] is None:  # the weights behind it, which the default name depends on, are on the cluster
            raise UserError(f"init.from={source} is looked up on the cluster, so name the run here; add --name")
    run = check_run_name(values["name"] or default_run_name(config))
    return run, config.digest(), config.recipe, [] if values["name"] else ["--name", run]


def _tune(values: Values) -> Checked:
    from spikefleet.runs.run_dir import check_run_name

    fixed, data = split_overrides(values["overrides"] or [])
    refuse_relative(_paths_among(data))
    names = ("workers", "cpus_per_worker", "gpus_per_worker")
    budget = {"trials": values["trials"], "hours": values["hours"]}
    changes = {"overrides": fixed, "budget": budget, "resources": {name: values[name] for name in names}}
    wanted_search(values["search"], changes, values["objectives"])
    name = check_run_name(values["name"] or Path(values["search"]).stem)
    return name, "", "", [] if values["name"] else ["--name", name]


def _reproduce(values: Values) -> Checked:
    from spikefleet.reproduction.table import load_table

    _, data = split_overrides(values["overrides"] or [])
    refuse_relative(_paths_among(data))
    table = load_table(values["table"])
    name = f"{table.name}-{table.scale(values['scale'])}"
    chosen = [values["only"], *(values["overrides"] or [])]
    return name if chosen == ["*"] else f"{name}-{_digest(chosen)[:8]}", "", "", []


def _retrain(values: Values) -> Checked:
    from spikefleet.config.recipes import parse_overrides
    from spikefleet.registry.version import check_model_name

    overrides = parse_overrides(values["overrides"] or [])
    gate_store = {"retrain.gate_store": overrides.get("retrain.gate_store")}
    refuse_relative({**_paths_among(overrides), **_unless_named({"--data": values["data"], **gate_store})})
    if values["schedule"] is not None:
        from spikefleet.retraining.schedule import next_time

        next_time(values["schedule"], values["timezone"])
    return check_model_name(values["model"]), "", "", []


def _prepare(values: Values) -> Checked:
    check_source(values["source"])
    refuse_relative({"ROOT": values["root"], "--images": values["images"], "--annotations": values["annotations"]})
    return (values["out"].name if values["out"] else values["source"]), "", "", []


def _evaluate(values: Values) -> Checked:
    network = values["network"]
    local = None if re.match(r"[a-z]+:/", network) else network
    refuse_relative(_unless_named({"NETWORK": local, "--data": values["data"]}))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", values["network"].removeprefix("models:/")).strip("-")
    return f"{name}-{values['split']}", "", "", []


_KINDS: dict[str, Callable[[Values], Checked]] = {
    "train": _train,
    "tune": _tune,
    "reproduce": _reproduce,
    "retrain": _retrain,
    "data-prepare": _prepare,
    "evaluate": _evaluate,
}
