"""`init.from`: the trained weights that a run starts from, resolved to their hash before the run has a name.

An alias moves and a run trains on, so the configuration gets the SHA-256 of what was taken (`train.initial_weights`).
Weights are read as safetensors, never unpickled.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from spikefleet.config.recipes import override_config
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.files import read_json_object, sha256_of, write_json
from spikefleet.registry.mlflow_store import connect, resolve
from spikefleet.registry.package import WEIGHTS, verify_package
from spikefleet.registry.package_access import package_files
from spikefleet.runs.run_dir import Run, find_run
from spikefleet.status import print_line
from spikefleet.training.checkpoints import INITIAL_WEIGHTS, best_weights
from spikefleet.training.fine_tuning import Fitted, fit_weights
from spikefleet_models.families import build_model
from spikefleet_tune.atomic import replacing

INIT = "init.json"
"""File name of the record in a run: where the weights are from, and what was taken."""


@dataclass(frozen=True)
class InitialWeights:
    """The weights of a run's start, not yet written."""

    source: str
    """As it was asked for."""
    resolved: str
    """The version, checkpoint or file that it was."""
    sha256: str
    """Of the file of the trained weights."""
    fitted: Fitted
    content: bytes
    """The tensors that are taken, as safetensors."""

    @property
    def digest(self) -> str:
        """SHA-256 of what is taken."""
        return hashlib.sha256(self.content).hexdigest()

    def write(self, run: Run) -> None:
        """Writes the weights and the record into the directory of a run, atomically, where they are not there yet."""
        path = run.path / INITIAL_WEIGHTS
        if path.is_file() and sha256_of(path) == self.digest:
            return
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(
            run.path / INIT,
            {
                "from": self.source,
                "resolved": self.resolved,
                "sha256": self.sha256,
                "taken": sorted(self.fitted.taken),
                "anew": list(self.fitted.anew),
                "unused": list(self.fitted.unused),
            },
        )
        with replacing(path) as partial:
            partial.write_bytes(self.content)


def resolve_init(config: Config, runs_dir: Path, tracking_uri: str) -> tuple[Config, InitialWeights | None]:
    """Finds the weights of `init.from`, and what the network takes of them.

    Args:
        config: of the run.
        runs_dir: directory of runs.
        tracking_uri: of the registry.

    Returns:
        The configuration with the hash of the weights, and the weights; as it is, and None, where nothing is asked for
        or a saved configuration has the hash already.

    Raises:
        UserError: the weights are not there or damaged, or none fits.
    """
    source = config.init.source
    if source is None or config.train.initial_weights is not None:
        return config, None
    resolved, sha256, given = _read(source, runs_dir, tracking_uri)
    with torch.device("meta"):
        network = build_model(config.model).state_dict()
    fitted = fit_weights(network, given)
    weights = InitialWeights(source, resolved, sha256, fitted, save(fitted.taken))
    overrides = {"train.initial_weights": weights.digest}
    return override_config(config, overrides, origin=f"init.from={source}"), weights


def tell_init(weights: InitialWeights, console: Console) -> None:
    """Says what a training starts from, and every tensor that is not taken."""
    fitted = weights.fitted
    total = len(fitted.taken) + len(fitted.anew)
    named = "" if weights.resolved == weights.source else f" ({weights.source})"
    print_line(console, f"init: {len(fitted.taken)} of {total} tensors of {weights.resolved}{named}")
    if fitted.anew:
        print_line(console, f"made anew: {', '.join(fitted.anew)}")
    if fitted.unused:
        print_line(console, f"not taken: {', '.join(fitted.unused)}")


def lineage(run: Run) -> dict[str, str]:
    """Tags of what a run was trained from; none where it starts from random weights."""
    path = run.path / INIT
    if not path.is_file():
        return {}
    record = read_json_object(path, "resolved")
    return {"init_from": str(record["resolved"]), "init_sha256": str(record.get("sha256", ""))}


def _read(source: str, runs_dir: Path, tracking_uri: str) -> tuple[str, str, dict[str, torch.Tensor]]:
    """What the source is, the SHA-256 of its file, and its tensors."""
    if source.startswith("models:"):
        with connect(tracking_uri) as client:
            version = resolve(client, source)
        exact = f"models:/{version.name}/{version.version}"
        with package_files(exact, tracking_uri) as (directory, content_hash):
            verify_package(directory, content_hash)
            return exact, *_load(directory / WEIGHTS)
    path = Path(source)
    if path.suffix in (".pt", ".pth", ".pkl", ".ckpt", ".bin"):
        raise UserError(
            f"init.from={source}: such files are pickles, which are not read here; weights that SpikeYOLO's authors "
            f"released become safetensors by `spikefleet convert {source} MODEL --out FILE.safetensors`, others by "
            "safetensors.torch.save_file(model.state_dict(), FILE) where you trust them"
        )
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"init.from={source}: there is no such file; name a .safetensors file")
        return str(path), *_load(path)
    run = find_run(runs_dir, source)
    weights = best_weights(run.best_checkpoint())
    return f"run {run.name}, {weights.parent.name}", *_load(weights)


def _load(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    try:
        return sha256_of(path), load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"init.from: {path} cannot be read as safetensors: {error}; use other weights") from None
