"""Loads a trained network by reference: a registered version, a package, a run, or a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import nn

from spikefleet import registry
from spikefleet.certificates.certify import CERTIFICATE
from spikefleet.certificates.energy_card import ENERGY, read_card
from spikefleet.certificates.spike_check import PROOF
from spikefleet.config.recipes import parse_config
from spikefleet.config.schema import Config
from spikefleet.data_access import open_data, store_at
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object
from spikefleet.plugins import missing_plugins_named
from spikefleet.registry.package import CARD, load_network
from spikefleet.registry.package import read_card as read_package_card
from spikefleet.runs.run_dir import Run, find_run
from spikefleet.status import counting
from spikefleet.tasks import AnyTask, build_task
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.training.checkpoints import best_network, checkpoint_hash, load_checkpoint
from spikefleet.training.distributed import ProcessGroup, pick_device
from spikefleet.training.evaluation import Evaluation, evaluate
from spikefleet_models.energy import EnergyCard
from spikefleet_models.low_precision import Precision
from spikefleet_models.reparam import deploy
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Samples, Store

SliceOrder = Literal["shuffled", "reversed"]
"""Another order of the time slices of recordings than the recorded one."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A network in evaluation mode on the CPU, with its configuration and data summary."""

    reference: str
    network: nn.Module
    config: Config
    data: DataSummary
    """Summary of its training data."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Its recorded metrics by split and name, such as "test/top1"."""
    card: EnergyCard | None = None
    """Its recorded energy card."""
    folders: tuple[Path, ...] = ()
    """Directories whose files it was read from, over which nothing may be written."""
    read_proof: Callable[[], Mapping[str, Any] | None] = lambda: None
    """Reads `proof`, when it is asked for: a damaged file is no reason against making a new one."""
    report: Path | None = None
    """Directory of the report of its run, if it was opened by the name of a run."""
    precision: Precision | None = None
    """Of the weights, where the network is the deployed one (`in_precision`)."""

    @cached_property
    def task(self) -> AnyTask:
        """The task of the network."""
        return build_task(self.config, self.data)

    @cached_property
    def proof(self) -> Mapping[str, Any] | None:
        """Its recorded spike check, as `spike_check.SpikeCheck.to_dict` returns it; None where there is none of it.

        Raises:
            UserError: the file is damaged.
        """
        return self.read_proof()


def open_trained_network(reference: str, runs_dir: Path) -> TrainedNetwork:
    """Loads a network; nothing is unpickled, and every file is verified against its hash.

    Args:
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, the directory of a pulled package or of a checkpoint,
            or the name or directory of a run (its best checkpoint).
        runs_dir: directory of the runs.

    Raises:
        UserError: the reference does not exist, or a file is damaged.
    """
    if reference.startswith("models:"):
        with tempfile.TemporaryDirectory(prefix="spikefleet-") as scratch:
            folder = Path(scratch) / "package"
            registry.pull(reference, folder, tracking_uri=resolve_tracking_uri(runs_dir))
            return replace(open_package(reference, folder), folders=())
    path = Path(reference)
    if (path / CARD).is_file():
        return open_package(reference, path)
    if path.is_dir() and path.parent.name == "checkpoints":
        return _from_checkpoint(reference, path, Run(path.parent.parent))
    # A folder of images often has the name of the run that was trained on it.
    if path.is_dir() and not Run(path).exists and not Run(runs_dir / reference).exists:
        raise UserError(
            f"{path} is neither a registered network (with {CARD}) nor a run or a checkpoint of one; name a run in "
            f"{runs_dir}, or models:/NAME@champion"
        )
    run = find_run(runs_dir, reference)
    return replace(_from_checkpoint(reference, run.best_checkpoint(), run), report=run.path / "report")


def in_precision(trained: TrainedNetwork, precision: Precision) -> TrainedNetwork:
    """The deployed network with weights of a precision, which computes without autocast whatever it was trained in.

    Args:
        trained: the network as it was trained; not changed.
        precision: fp32, bf16 or int8.

    Raises:
        UserError: spikes feed no layer of the network, so that nothing would be rounded, or it cannot be deployed.
    """
    try:
        network = deploy(trained.network, precision=precision)
    except ValueError as error:
        raise UserError(f"{trained.reference}: {error}") from None
    plain = trained.config.train.model_copy(update={"precision": "fp32"})
    config = trained.config.model_copy(update={"train": plain})
    return replace(trained, network=network, config=config, precision=precision)


def open_package(reference: str, folder: Path) -> TrainedNetwork:
    """Loads the network of a package, as `open_trained_network`; messages name it by `reference`."""
    network, plain = load_network(folder)
    metadata = read_package_card(folder).metadata
    with missing_plugins_named(metadata.get("plugins", ()), reference):
        config = parse_config(plain, origin=reference)
    metrics = _metrics(metadata.get("metrics", {}), f"{folder / CARD}")
    data, card = DataSummary.read(folder), _energy_card(folder)
    return TrainedNetwork(reference, network, config, data, metrics, card, (folder,), partial(_proof, folder))


def _from_checkpoint(reference: str, checkpoint: Path, run: Run) -> TrainedNetwork:
    snapshot = load_checkpoint(checkpoint)
    config = run.parse(snapshot.config, origin=str(checkpoint))
    network, record = best_network(snapshot, config.model), run.record()
    metrics = {f"val/{name}": value for name, value in (record.get("validation") or {}).items()}
    metrics |= {f"test/{name}": value for name, value in (record.get("test") or {}).items()}
    report = run.path / "report"
    return TrainedNetwork(
        reference,
        network,
        config,
        run.data(),
        metrics,
        _energy_card(report),
        (checkpoint,),
        partial(_proof, report, checkpoint),
    )


def _metrics(plain: Any, where: str) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in plain.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged: its metrics are no numbers by name ({error})") from None


def _energy_card(folder: Path) -> EnergyCard | None:
    """Reads the energy card of a folder, if it has one. Raises UserError if the file is damaged."""
    path = folder / ENERGY
    if not path.is_file():
        return None
    return read_card(path)


def _proof(folder: Path, checkpoint: Path | None = None) -> dict[str, Any] | None:
    """Reads the spike check of a folder, if it has one, and has it of that checkpoint.

    Raises UserError if the file is damaged.
    """
    path, certificate = folder / PROOF, folder / CERTIFICATE
    if not path.is_file():
        return None
    if checkpoint is not None:
        if not certificate.is_file():
            return None
        if read_json_object(certificate).get("checkpoint") != checkpoint_hash(checkpoint):
            return None
    return read_json_object(path, "verdict")


def open_split(
    trained: TrainedNetwork, split: str, stores_dir: Path, console: Console, *, data: str | None = None
) -> Samples:
    """Opens a split of the network's own data, or of another store; arguments and errors as of `open_store`.

    Args:
        trained: the network.
        split: name of the split; that of the same images is opened where it is only a second name.
        stores_dir: directory of prepared stores.
        console: for progress.
        data: location of another store, or its name in `stores_dir`; by default the network's own data.
    """
    store = open_store(trained, stores_dir, console, data=data)
    return store.samples(store.manifest.original(split))


def open_store(trained: TrainedNetwork, stores_dir: Path, console: Console, *, data: str | None = None) -> Store:
    """Opens the network's own data, or another store that it can be measured on.

    Args:
        trained: the network.
        stores_dir: directory of prepared stores.
        console: for progress.
        data: location of another store, or its name in `stores_dir`; by default the network's own data.

    Raises:
        UserError: the classes, category ids or orientation of the store are not those of the training data.
        SourceError: the data is missing and cannot be prepared.
        StoreError: the store is damaged.
    """
    config = trained.config.data
    if data is not None:
        config = config.model_copy(update={"store": store_at(data, stores_dir)})
    store = open_data(config, stores_dir, console)
    if store.manifest.class_names != trained.data.class_names:
        raise UserError(
            f"{store.location}: expected the classes {', '.join(trained.data.class_names[:5])}, ... of "
            f"{trained.reference}, found {', '.join(store.manifest.class_names[:5])}, ..."
        )
    if tuple(store.manifest.category_ids or ()) != trained.data.category_ids:
        raise UserError(
            f"{store.location}: its category ids are not those of the data of {trained.reference}, so metrics by class "
            "would be wrong; use a store with the same categories"
        )
    events = store.manifest.events
    if events is not None and events.orientation != trained.data.orientation:
        raise UserError(
            f"{store.location}: x, y and polarity were read as {events.orientation}, but {trained.reference} was "
            f"trained on events read as {trained.data.orientation or 'images'}; use a store with the same orientation"
        )
    return store


def evaluate_on_split(
    trained: TrainedNetwork,
    split: str,
    stores_dir: Path,
    console: Console,
    *,
    data: str | None = None,
    gpu: bool = False,
    slice_order: SliceOrder | None = None,
) -> Evaluation[Any, Any]:
    """Evaluates a network on a split.

    Args:
        trained: the network.
        split: name of the split.
        stores_dir: directory of prepared stores.
        console: for progress.
        data: location of another store; by default the data of the network's configuration.
        gpu: run on the GPU.
        slice_order: another order of the time slices, for networks on recordings of events with classes.

    Returns:
        Predictions and targets in the order of the split; with the accuracy over time, unless the order is another.

    Raises:
        UserError: another order is asked for of other data; the classes or category ids of the store are not those of
            the training data.
        SourceError: the data is missing and cannot be prepared.
        StoreError: the store is damaged.
    """
    transform = trained.config.transform
    if slice_order is not None:
        if "slice_order" not in type(transform).model_fields:
            raise UserError(
                f"slice_order is {slice_order}, but {trained.reference} reads {transform.kind!r}, which has no time "
                "slices to reorder; leave it out"
            )
        transform = transform.model_copy(update={"slice_order": slice_order})
    rows = open_split(trained, split, stores_dir, console, data=data)
    group = ProcessGroup(0, 1, pick_device(gpu))
    processes = trained.config.data.loader_processes
    loader = BatchLoader(rows, transform, train=False, processes=processes, device=group.device)
    what = rows.name if slice_order is None else f"{rows.name}, slices {slice_order}"
    with counting(console, f"evaluating {what}") as progress:
        network = trained.network.to(group.device)
        evaluation = evaluate(
            network, trained.task, loader, trained.config.train, group, progress, over_time=slice_order is None
        )
    assert evaluation is not None, "rank 0 gets the predictions"
    return evaluation
