"""The serving code of a registered model ("models from code"): MLflow runs this file when it loads a version.

The file stands alone. It takes everything else from the installed spikefleet if that reads packages of the version's
format, else from the code in the version, whose hash is checked before a line of it runs.
"""

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import BAD_REQUEST, MlflowException

CARD = "card.json"
CODE = "code.zip"
PACKAGES = ("spikefleet", "spikefleet_models", "spikefleet_pipelines", "spikefleet_tune")


class RegisteredNetwork(mlflow.pyfunc.PythonModel):
    """A network for MLflow: images `[B, C, H, W]` of integers from 0 to 255, or windows of events -> answers.

    Images are resized as by `spikefleet predict`, each for itself where their sizes differ. Classification serves a
    probability for each class, a table `[B, K]` with the names of the classes; detection serves the objects of each
    image, with name, score and box (x1 y1 x2 y2 in pixels of the image).
    """

    def load_context(self, context: Any) -> None:
        """Verifies the package beside this file and builds its network.

        MLflow's `model_config={"precision": "int8"}` (or bf16) serves it with rounded weights.

        Raises:
            UserError: the package is not intact.
            MlflowException: no code that reads it can be used.
        """
        package = Path(context.artifacts[CARD]).parent
        use_code(package)
        from spikefleet.registry.served_network import ServedNetwork

        precision = (context.model_config or {}).get("precision", "fp32")
        # An installed spikefleet that reads this format may be older than weights of other precisions.
        self._served = ServedNetwork.open(package) if precision == "fp32" else ServedNetwork.open(package, precision)

    # MLflow supports this type hint; it warns about most others, and about none.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Any:
        """Answers for images.

        Raises:
            MlflowException: the images are not integers from 0 to 255 in the form `[B, C, H, W]`; of other errors the
                server of MLflow does not show the message.
        """
        from spikefleet.errors import UserError

        try:
            return self._served.answer(model_input)
        except UserError as error:
            raise MlflowException(str(error), error_code=BAD_REQUEST) from None


def use_code(package: Path) -> None:
    """Sees to it that `import spikefleet` gives code that reads a package.

    Args:
        package: its directory.

    Raises:
        MlflowException: the package is damaged, or another format's spikefleet is in use in this process.
    """
    try:
        card = json.loads((package / CARD).read_text(encoding="utf-8"))
        wanted, digest = card["format"], card["sha256"].get(CODE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MlflowException(f"{package / CARD} is damaged ({error!r}); download the version again") from None
    in_use = sorted(_imported())
    if (found := _importable_format()) == wanted:
        return
    if in_use:
        raise MlflowException(
            f"this process has imported spikefleet, which reads format {found} of registered networks; the version "
            f"has format {wanted} and brings its own code: load it in a process that has not imported spikefleet, "
            "or register it again with `spikefleet registry renew`"
        )
    for name in _imported():  # what was asked for its format, of the installed spikefleet
        del sys.modules[name]
    if digest is None or not (package / CODE).is_file():
        raise MlflowException(f"{package} brings no code of its own ({CODE}), and spikefleet is not installed here")
    code = (package / CODE).read_bytes()
    if (has := hashlib.sha256(code).hexdigest()) != digest:
        raise MlflowException(f"{package / CODE} is not the registered file: expected SHA-256 {digest}, found {has}")
    sys.meta_path.insert(0, _CodeOfVersion(code, str(package / CODE)))


def _imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in PACKAGES]


def _importable_format() -> int | None:
    """The format that the spikefleet of this process or environment reads; None without one."""
    try:
        from spikefleet.registry.package_format import FORMAT
    except ImportError:
        return None
    return FORMAT


class _CodeOfVersion(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Imports modules from the bytes of an archive, so that what runs is what was hashed."""

    def __init__(self, archive: bytes, origin: str) -> None:
        self._origin = origin
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            self._sources = {name: files.read(name).decode() for name in files.namelist()}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of the archive; None for all others."""
        if self._file(name) not in self._sources:
            if name.partition(".")[0] in PACKAGES:
                raise ModuleNotFoundError(f"{name} is not in {self._origin}: serving does without it", name=name)
            return None
        inside = [self.get_filename(name).removesuffix("/__init__.py")] if self.is_package(name) else None
        return importlib.util.spec_from_file_location(
            name, self.get_filename(name), loader=self, submodule_search_locations=inside
        )

    def is_package(self, name: str) -> bool:
        """Whether the module is a package."""
        return self._file(name).endswith("/__init__.py")

    def get_source(self, name: str) -> str:
        """The source, for import and for tracebacks."""
        return self._sources[self._file(name)]

    def get_data(self, path: str) -> bytes:
        """A file of the archive by its path, as `get_filename` has it: modules read files beside their own.

        Raises:
            OSError: there is no such file in the archive.
        """
        name = path.removeprefix(f"{self._origin}/")
        if name not in self._sources:
            raise FileNotFoundError(f"{name} is not in {self._origin}")
        return self._sources[name].encode()

    def get_filename(self, name: str) -> str:
        """A path for tracebacks; there is no such file."""
        return f"{self._origin}/{self._file(name)}"

    def _file(self, name: str) -> str:
        path = name.replace(".", "/")
        package = f"{path}/__init__.py"
        return package if package in self._sources else f"{path}.py"


mlflow.models.set_model(RegisteredNetwork())
