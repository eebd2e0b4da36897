"""The code that travels with a version, and the packages that it needs: an environment of these alone serves it.

What travels is decided by the imports: the modules that serve, what they import, and so on, each with the imports
inside its functions. Left out is what draws, measures or reads stores, which no request reaches; functions import it.
The native spiking unit, which is imported by name, travels with its C++, so that a version is served in the form that
its latency was measured in where there is a compiler.
"""

from __future__ import annotations

import ast
import io
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path

from spikefleet.config.task_table import find_task, list_tasks

PACKAGES = ("spikefleet", "spikefleet_models", "spikefleet_pipelines", "spikefleet_tune")
"""The import packages of this distribution."""

_SERVED_NETWORK = "spikefleet.registry.served_network"

_LEFT_OUT = (
    "spikefleet.plot_text",
    "spikefleet.plots",
    "spikefleet.tasks.event_details",
    "spikefleet.tasks.event_metrics",
    "spikefleet.tasks.mistakes",
    "spikefleet.tasks.per_image",
    "spikefleet_pipelines.sources",
    "spikefleet_pipelines.store",
    "spikefleet_pipelines.transforms.auto_augment",
    "spikefleet_pipelines.transforms.mixing",
    "spikefleet_pipelines.transforms.shown",
)
"""Modules and packages that no request reaches, where a function imports them."""

_KERNELS = "spikefleet_models.kernels"
_BY_NAME = {_KERNELS: [f"{_KERNELS}.native_{part}" for part in ("check", "integers", "library", "unit")]}
"""Modules that a module imports by their names."""
_BESIDE = {f"{_KERNELS}.native_library": "native_*.[ch]*"}
"""Files, by a pattern, that a module reads beside its own."""

_DISTRIBUTIONS = {
    "numpy": "numpy",
    "pandas": "pandas",
    "pycocotools": "",  # measures
    "pydantic": "pydantic",
    "pydantic_core": "pydantic",
    "safetensors": "safetensors",
    "spikingjelly": "spikingjelly",
    "torch": "torch",
    "torchvision": "torchvision",
    "triton": "torch",
    "yaml": "pyyaml",
}
"""The distribution of each package that the code imports; none for one that no request reaches."""

_MLFLOW = ("mlflow-skinny", "alembic", "sqlalchemy")
"""MLflow without its server's pages; with the other two it also opens a registry in a database."""

_WHEN = (1980, 1, 1, 0, 0, 0)  # of all files in the archive, so that equal code gives equal bytes


@dataclass(frozen=True)
class ServingCode:
    """The modules that serve a version, and what they need."""

    sources: dict[str, Path]
    """File of each module, and files that modules read, by their paths in the archive."""
    distributions: tuple[str, ...]
    """What is to be installed beside them."""

    def archive(self) -> bytes:
        """The modules as a ZIP; of equal sources it is equal."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as files:
            for name in sorted(self.sources):
                entry = zipfile.ZipInfo(name, _WHEN)
                entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
                files.writestr(entry, self.sources[name].read_bytes(), compresslevel=9)
        return content.getvalue()

    def requirements(self) -> list[str]:
        """The distributions, each pinned to the version that is installed here."""
        return [f"{name}=={metadata.version(name).split('+')[0]}" for name in self.distributions]


@cache
def serving_code() -> ServingCode:
    """The code that serves the networks of all built-in tasks and families.

    It is the same for each of them: of two versions in one process, the second uses the code of the first.
    """
    tasks = (find_task(name).implementation.partition(":")[0] for name in list_tasks())
    waiting = [_SERVED_NETWORK, *(module for module in tasks if _is_ours(module))]
    sources: dict[str, Path] = {}
    distributions = set(_MLFLOW)
    while waiting:
        module = waiting.pop()
        file, path = _file_of(module)
        if path in sources:
            continue
        sources[path] = file
        waiting += [parent] if (parent := module.rpartition(".")[0]) else []
        waiting += _BY_NAME.get(module, [])
        if module in _BESIDE:
            folder = path.rpartition("/")[0]
            sources |= {f"{folder}/{beside.name}": beside for beside in file.parent.glob(_BESIDE[module])}
        for name, in_function in _imports(ast.parse(file.read_bytes())):
            top = name.partition(".")[0]
            if _is_ours(name):
                if not (in_function and f"{name}.".startswith(tuple(f"{left}." for left in _LEFT_OUT))):
                    waiting.append(name)
            elif top not in sys.stdlib_module_names:
                assert top in _DISTRIBUTIONS, f"{module} imports {top}, but no version requires it: see _DISTRIBUTIONS"
                distributions.add(_DISTRIBUTIONS[top])
    return ServingCode(sources, tuple(sorted(distributions - {""})))


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _file_of(module: str) -> tuple[Path, str]:
    """The file of a module of ours, and its path in the archive."""
    top, *parts = module.split(".")
    folder = Path(str(resources.files(top))).joinpath(*parts)
    if (file := folder / "__init__.py").is_file():
        return file, "/".join((top, *parts, file.name))
    return folder.with_suffix(".py"), f"{'/'.join((top, *parts))}.py"


def _imports(node: ast.AST, in_function: bool = False) -> Iterator[tuple[str, bool]]:
    """Iterates over the modules that code imports, and whether a function does; not over those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports of these packages are absolute"
            yield from ((_module_of(child.module or "", alias.name), in_function) for alias in child.names)
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _imports(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def _module_of(module: str, name: str) -> str:
    """The module that `from module import name` imports: `name` itself, where that is a module."""
    inner = f"{module}.{name}"
    return inner if _is_ours(module) and _file_of(inner)[0].is_file() else module
