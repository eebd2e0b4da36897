"""A process that can import the standard library and named packages, and nothing else, serves versions.

usage: python -I fenced.py REQUEST, a file of JSON: `admitted`, the packages; `unwanted`, names to try to import;
`serve`, the model directories to serve over HTTP by name; `open`, for each name a package and images for it. It prints
a line of JSON when it serves: `refused`, `ports`, `answers`, and the `form` of spiking units; and at the end of its
input one with the file of each module that it imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class Fence(importlib.abc.MetaPathFinder):
    """Finds the admitted packages and the standard library on the path, and nothing else."""

    def __init__(self, admitted: Iterable[str]) -> None:
        self._admitted = {*admitted, *sys.stdlib_module_names}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        if top in self._admitted or top.startswith("_sysconfigdata"):  # the standard library's, named by build
            return importlib.machinery.PathFinder.find_spec(name, path, target)
        return None

    def find_distributions(self, *context: Any) -> Any:
        """For `importlib.metadata`."""
        return importlib.machinery.PathFinder.find_distributions(*context)


def refused(names: Iterable[str]) -> list[str]:
    """Which of these cannot be imported."""
    found = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            found.append(name)
    return found


def serve(model: Any) -> int:
    """Serves a model with the application of `mlflow models serve`; returns the port."""
    import socket

    import uvicorn
    from mlflow.pyfunc import scoring_server

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(scoring_server.init(model), log_level="error", lifespan="off"))
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    port: int = listening.getsockname()[1]
    return port


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    builtin = (importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter)
    sys.meta_path[:] = [*builtin, Fence(request["admitted"])]
    absent = refused(request["unwanted"])
    import mlflow.pyfunc

    ports = {name: serve(mlflow.pyfunc.load_model(place)) for name, place in request["serve"].items()}
    from spikefleet.registry.served_network import ServedNetwork

    answers = {}
    for name, (package, images) in request["open"].items():
        answer = ServedNetwork.open(Path(package)).answer(images)
        answers[name] = answer if isinstance(answer, list) else answer.to_numpy().tolist()
    import torch

    from spikefleet_models.kernels import unit_form

    form = unit_form(torch.device("cpu"))
    print(json.dumps({"refused": absent, "ports": ports, "answers": answers, "form": form}), flush=True)
    sys.stdin.read()
    print(json.dumps({name: getattr(module, "__file__", None) for name, module in sys.modules.items()}), flush=True)


if __name__ == "__main__":
    main()
