"""Plugins: external modules that register model families, tasks, sources or transforms when they are imported.

An installed distribution (entry-point group `spikefleet.plugins`), `--plugin MODULE` or SPIKEFLEET_PLUGINS names a
plugin; recipes and stored configurations cannot: reading them runs no code. Each run and version records the loaded
plugins, and workers and trials load those of the driver.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from spikefleet.errors import UserError

GROUP = "spikefleet.plugins"
"""Entry-point group of plugins."""
VARIABLE = "SPIKEFLEET_PLUGINS"
"""Environment variable with the modules of plugins, separated by commas."""

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_loaded: dict[str, None] = {}


def load_plugins(names: Iterable[str] = ()) -> tuple[str, ...]:
    """Imports the installed plugins, those of SPIKEFLEET_PLUGINS, and `names`.

    Args:
        names: modules of further plugins.

    Returns:
        The modules of all plugins that this process has loaded, in order.

    Raises:
        UserError: a name is not that of a module, or its import fails.
    """
    installed = (entry.value.partition(":")[0] for entry in metadata.entry_points(group=GROUP))
    listed = (name.strip() for name in os.environ.get(VARIABLE, "").split(","))
    for name in (*installed, *listed, *names):
        if name and name not in _loaded:
            _import(name)
            _loaded[name] = None
    if _loaded:
        os.environ[VARIABLE] = ",".join(_loaded)  # for child processes
    return loaded_plugins()


def loaded_plugins() -> tuple[str, ...]:
    """Modules of the plugins that this process has loaded, in order."""
    return tuple(_loaded)


@contextmanager
def missing_plugins_named(recorded: Any, what: str) -> Iterator[None]:
    """A block that reads the configuration of a run or version that was trained with plugins.

    What is recorded is all that was loaded then, which another machine need not have: a plugin is missed where the
    block fails.

    Args:
        recorded: the names of its plugins, as read from a file.
        what: names it in errors.

    Raises:
        UserError: the block does; where plugins are not loaded, its sentence also names them and the remedy.
    """
    try:
        yield
    except UserError as error:
        if not isinstance(recorded, list | tuple) or not all(isinstance(name, str) for name in recorded):
            raise UserError(
                f"{error}; {what} is damaged: its plugins are {str(recorded)[:80]}, and not a list of names"
            ) from None
        missing = [name for name in recorded if name not in _loaded]
        if not missing:
            raise
        raise UserError(
            f"{error}; {what} was trained with plugin {', '.join(missing)}, which is not loaded; "
            f"give {' '.join(f'--plugin {name}' for name in missing)}, or set {VARIABLE}={','.join(missing)}"
        ) from None


def _import(name: str) -> None:
    if not _MODULE.fullmatch(name):
        raise UserError(f"plugin {name!r} must be the name of a module, such as my_package.my_family")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"plugin {name} cannot be imported: {error}; install it, or add its directory to PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # an external module may raise anything
        raise UserError(f"plugin {name} cannot be loaded: {type(error).__name__}: {error}") from error
