"""A whole export: open, write beside the target, compare, put in place, record with the version.

The file gets its name when the comparison has passed: a refused export leaves nothing behind.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import nn

from spikefleet.errors import UserError
from spikefleet.export.comparison import Comparison, Run, compare_outputs, compare_spikes
from spikefleet.export.extras import check_extras
from spikefleet.export.origin import Origin, open_origin
from spikefleet.export.pixels import ImagesToCompare, Scaling
from spikefleet.export.record import record_export
from spikefleet.export.recorded import RecordedNetwork
from spikefleet.files import sha256_of
from spikefleet.outputs import check_outputs
from spikefleet.status import Count, counting, waiting
from spikefleet_models.low_precision import PackedWeight, Precision, packed_weights, rounded
from spikefleet_models.reparam import deploy
from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_tune.atomic import replacing

Format = Literal["onnx", "nir", "spikes"]

_MEMORY_OF_SPIKES = 4
"""Images at once, where all spikes of two networks are in memory."""


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    uri: str
    """Of the version, or what was given."""
    form: Format
    files: tuple[Path, ...]
    """The file itself first."""
    sha256: str
    size: int
    """In bytes."""
    comparison: Comparison
    recorded: bool
    """Whether the version in the registry says so too."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "network": self.uri,
            "format": self.form,
            "files": [str(path) for path in self.files],
            "sha256": self.sha256,
            "bytes": self.size,
            "comparison": self.comparison.to_dict(),
            "recorded": self.recorded,
        }


def export_network(
    reference: str,
    form: Format,
    out: Path,
    *,
    runs_dir: Path,
    stores_dir: Path,
    console: Console,
    split: str = "test",
    data: str | None = None,
    images: int | None = None,
    precision: Precision = "fp32",
    force: bool = False,
) -> Exported:
    """Exports a trained network and compares the file with it on the images of a split.

    Beside F lies F.json, which says where the network is from, what its input is, and what was compared; beside a NIR
    file also F.test.npz, one image with all spikes that it causes. Of a registered version, hash and comparison are
    kept with it.

    Args:
        reference: NAME@ALIAS, NAME/VERSION, a pulled directory, a run's name or a checkpoint.
        form: of the file.
        out: the file.
        runs_dir: directory of the runs.
        stores_dir: directory of prepared stores.
        console: for progress.
        split: whose images are compared.
        data: location of another store; by default the data of the network's configuration.
        images: to compare, at most; by default all.
        precision: of the weights of the layers that spikes feed; other than fp32, batch norms are folded.
        force: replace files that are there.

    Raises:
        UserError: a library is missing, the reference does not exist, the format lacks what the network has, nothing of
            it can be rounded, or a file cannot be written.
        RunError: the file does not compute what the network does.
    """
    check_extras(form)
    files = (out, Path(f"{out}.json"), *((Path(f"{out}.test.npz"),) if form == "nir" else ()))
    check_outputs(files, force=force)
    with waiting(console, f"opening {reference}"):
        origin = open_origin(reference, runs_dir)
    check_outputs(files, inputs=origin.trained.folders, force=force)
    compared = ImagesToCompare.of(origin.trained, split, stores_dir, console, data, images)
    described = {**origin.metadata(), "precision": precision, "input": compared.input_metadata(origin.trained)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        # Names are given in reverse: the file itself last, when what describes it is there.
        partial = {path: stack.enter_context(replacing(path)) for path in files}
        writer = _Writer(origin, compared, described, console, precision)
        comparison = writer.write(form, *partial.values())
        sha256, size = sha256_of(partial[out]), partial[out].stat().st_size
        record = {
            "sha256": sha256,
            "bytes": size,
            "comparison": comparison.to_dict(),
            "exported": datetime.now(UTC).isoformat(timespec="seconds"),
            "exported_by": described["exported_by"],
        }
        described |= {"format": form, **writer.semantics, "export": record}
        partial[files[1]].write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if origin.is_registered:
        with waiting(console, "recording the export"):
            named = form if precision == "fp32" else f"{form}.{precision}"
            record_export(origin.uri, named, record, runs_dir)
    return Exported(origin.uri, form, files, sha256, size, comparison, origin.is_registered)


class _Writer:
    """Writes a network in a format and compares the file."""

    def __init__(
        self,
        origin: Origin,
        images: ImagesToCompare,
        described: dict[str, Any],
        console: Console,
        precision: Precision,
    ) -> None:
        self._network = origin.trained.network
        self._packed: Mapping[str, PackedWeight] = {}
        if precision != "fp32":
            try:
                deployed = deploy(self._network)
                self._network, self._packed = rounded(deployed, precision), packed_weights(deployed, precision)
            except ValueError as error:
                raise UserError(f"{origin.uri}: {error}") from None
        self._timesteps: int = described["timesteps"]
        self._images, self._described, self._console = images, described, console
        self._scaling: Scaling = images.scaling
        self.semantics: Mapping[str, Any] = {}
        """What the format leaves open."""

    def write(self, form: Format, path: Path, description: Path, test_vector: Path | None = None) -> Comparison:
        """Writes the files, all but the description, and compares. Raises as `export_network`."""
        if form == "onnx":
            return self._onnx(path)
        if form == "nir":
            assert test_vector is not None
            return self._nir(path, test_vector)
        return self._spikes(path)

    def _onnx(self, path: Path) -> Comparison:
        from spikefleet.export.onnx_file import Fp64File, OnnxFile, onnx_of

        with waiting(self._console, "exporting to ONNX"):
            path.write_bytes(onnx_of(self._network, self._scaling, self._images.shape, self._described, self._packed))
            file = OnnxFile(path)

        def exact() -> tuple[Run, Run]:
            return Fp64File(path).run, self._run(copy.deepcopy(self._network).double())

        with counting(self._console, "comparing") as progress:
            return compare_outputs(file.run, self._run(self._network), self._images, exact, progress)

    def _nir(self, path: Path, test_vector: Path) -> Comparison:
        from spikefleet.export.nir_file import SEMANTICS, NirFile, folded_network, write_nir, write_test_vector
        from spikefleet.export.nir_graph import nir_graph

        self.semantics = {"nir": dict(SEMANTICS)}
        with waiting(self._console, "exporting to NIR"):
            graph = nir_graph(self._network, self._images.shape)
            graph.metadata = {"spikefleet": json.dumps({**self._described, **self.semantics})}
            write_nir(graph, path)
            folded = folded_network(self._network, self._scaling)
            write_test_vector(folded, self._images.first(), self._scaling, test_vector)
            file = NirFile(path, self._scaling, self._timesteps)
        return self._compare_spikes(file, folded)

    def _spikes(self, path: Path) -> Comparison:
        from spikefleet.export.spikes_file import SEMANTICS, SpikesFile, binary_network, write_spikes

        self.semantics = {"spikes": dict(SEMANTICS)}
        with waiting(self._console, "exporting the binary form"):
            try:
                write_spikes(self._network, self._scaling, self._images.first(), path, self._described)
            except NotSpikeDrivenError as error:
                raise UserError(f"the network has no spike-driven form: {error}") from error
            file = SpikesFile(path, self._scaling)
            file.check_test_vector()
            binary = binary_network(self._network, self._scaling)
        return self._compare_spikes(file, binary)

    def _compare_spikes(self, file: Any, folded: RecordedNetwork) -> Comparison:
        with counting(self._console, "comparing") as progress:
            return self._compared(file, folded, progress)

    def _compared(self, file: Any, folded: RecordedNetwork, progress: Count) -> Comparison:
        trained = self._run(self._network)
        return compare_spikes(file.run, folded.run, trained, self._images, progress, _MEMORY_OF_SPIKES)

    def _run(self, network: nn.Module) -> Run:
        """A network on uint8 images, with their scaling in the network's type."""
        import torch

        from spikefleet.export.recorded import as_outputs

        dtype = next(network.parameters()).dtype
        scaling = copy.deepcopy(self._scaling).to(dtype)
        return lambda pixels: as_outputs(network(scaling(torch.from_numpy(pixels))))
