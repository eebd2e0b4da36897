"""`init.from`: the trained weights that a run starts from, resolved to their hash before the run has a name.

An alias moves and a run trains on, so the configuration gets the SHA-256 of what was taken (`train.initial_weights`).
Weights are read as safetensors, never unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from spikefleet.config.recipes import override_config, parse_config
from spikefleet.config.renamed import with_current_keys
from spikefleet.config.schema import Config
from spikefleet.data_access import open_data
from spikefleet.errors import UserError
from spikefleet.files import read_json_object, sha256_of, write_json
from spikefleet.registry.mlflow_store import connect, resolve
from spikefleet.registry.package import WEIGHTS, read_config, verify_package
from spikefleet.registry.package_access import package_files
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import Run, find_run
from spikefleet.status import print_line, waiting
from spikefleet.training.checkpoints import INITIAL_WEIGHTS, best_weights
from spikefleet.training.fine_tuning import Fitted, fit_weights, with_unit_names
from spikefleet.training.threshold_scaling import Scaled, scale_to_thresholds
from spikefleet_models.families import build_model
from spikefleet_models.family import ModelConfig
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.store.reader import Store
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
    scaled: Scaled | None = None
    """What was done to them, with `init.scale_thresholds`."""

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
                **({} if self.scaled is None else {"scaled": asdict(self.scaled)}),
            },
        )
        with replacing(path) as partial:
            partial.write_bytes(self.content)


def resolve_init(
    config: Config, options: Options, tracking_uri: str, console: Console
) -> tuple[Config, InitialWeights | None]:
    """Finds the weights of `init.from`, and what the network takes of them.

    Args:
        config: of the run.
        options: directories of runs and of stores.
        tracking_uri: of the registry.
        console: for progress.

    Returns:
        The configuration with the hash of the weights, and the weights; as it is, and None, where nothing is asked for
        or a saved configuration has the hash already.

    Raises:
        UserError: the weights are not there or damaged, none fits, or they cannot be scaled.
    """
    source = config.init.source
    if source is None or config.train.initial_weights is not None:
        return config, None
    found = _read(source, options.runs_dir, tracking_uri)
    with torch.device("meta"):
        network = build_model(config.model).state_dict()
    fitted, scaled = fit_weights(network, with_unit_names(network, found.tensors)), None
    if config.init.scale_thresholds is not None:
        store = open_data(config.data, options.stores_dir, console)
        with waiting(console, "measuring activations of the initial weights"):
            fitted, scaled = _scaled(config, store, found, fitted)
    weights = InitialWeights(source, found.resolved, found.sha256, fitted, save(fitted.taken), scaled)
    overrides = {"train.initial_weights": weights.digest}
    return override_config(config, overrides, origin=f"init.from={source}"), weights


def _scaled(config: Config, store: Store, found: _Found, fitted: Fitted) -> tuple[Fitted, Scaled]:
    """What is taken, scaled to the thresholds of the network, by one thread: its bits are part of the run's identity.

    Raises:
        UserError: the configuration of the source is not known, or it cannot be scaled.
    """
    percentile = config.init.scale_thresholds
    assert percentile is not None
    if found.model is None:
        raise UserError(
            f"init.scale_thresholds={percentile:g} needs the configuration of the trained network, which a file of "
            "weights does not have; name its run or its registered version by init.from"
        )
    torch.manual_seed(config.train.seed)
    network, source = build_model(config.model), build_model(found.model)
    source.load_state_dict(found.tensors)
    network.load_state_dict({**network.state_dict(), **fitted.taken})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batches = [*islice(_training_batches(config, store), config.init.batches)]
        scaled = scale_to_thresholds(network, source, batches, percentile)
    finally:
        torch.set_num_threads(threads)
    whole = network.state_dict()
    return Fitted({name: whole[name] for name in fitted.taken}, fitted.anew, fitted.unused), scaled


def _training_batches(config: Config, store: Store) -> Iterator[Batch]:
    """The first batches of the first epoch, as the training sees them on one worker."""
    split = store.samples("train")
    size = min(config.train.global_batch, len(split))
    try:
        loader = BatchLoader(split, config.transform, train=True, seed=config.train.seed, epochs=config.train.epochs)
    except ValueError as error:
        raise UserError(f"the configuration does not fit the data: {error}") from error
    return loader.epoch(EpochPlan(samples=len(split), global_batch=size, seed=config.train.seed), 0)


def tell_init(weights: InitialWeights, console: Console) -> None:
    """Says what a training starts from, and every tensor that is not taken."""
    fitted = weights.fitted
    total = len(fitted.taken) + len(fitted.anew)
    named = "" if weights.resolved == weights.source else f" ({weights.source})"
    print_line(console, f"init: {len(fitted.taken)} of {total} tensors of {weights.resolved}{named}")
    if weights.scaled is not None:
        print_line(console, f"init: {weights.scaled.sentence()}")
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
    tags = {"init_from": str(record["resolved"]), "init_sha256": str(record.get("sha256", ""))}
    scaled = record.get("scaled")
    if isinstance(scaled, Mapping):
        tags["init_scaled"] = Scaled(**scaled).sentence()
    return tags


@dataclass(frozen=True)
class _Found:
    """Trained weights."""

    resolved: str
    """What the source is."""
    sha256: str
    """Of their file."""
    tensors: dict[str, torch.Tensor]
    model: ModelConfig | None
    """Of their network; None for a file of weights."""


def _read(source: str, runs_dir: Path, tracking_uri: str) -> _Found:
    if source.startswith("models:"):
        with connect(tracking_uri) as client:
            version = resolve(client, source)
        exact = f"models:/{version.name}/{version.version}"
        with package_files(exact, tracking_uri) as (directory, content_hash):
            verify_package(directory, content_hash)
            model = parse_config(with_current_keys(read_config(directory)), origin=exact).model
            return _Found(exact, *_load(directory / WEIGHTS), model)
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
        return _Found(str(path), *_load(path), None)
    if path.name != source:
        raise UserError(
            f"init.from={source} is neither a registered version nor a .safetensors file; name models:/NAME@ALIAS, "
            f"the file, or a run of {runs_dir} by its name alone"
        )
    run = find_run(runs_dir, source)
    weights = best_weights(run.best_checkpoint())
    return _Found(f"run {run.name}, {weights.parent.name}", *_load(weights), run.config().model)


def _load(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    try:
        return sha256_of(path), load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"init.from: {path} cannot be read as safetensors: {error}; use other weights") from None
