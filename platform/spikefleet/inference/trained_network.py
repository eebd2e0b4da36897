"""A trained network by its reference: a registered version, a package, a run, or a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from spikefleet.certificates.energy_card import ENERGY
from spikefleet.config.recipes import parse_config
from spikefleet.config.schema import Config
from spikefleet.data_access import open_data
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json
from spikefleet.registry.package import CARD, load_network, read_card
from spikefleet.runs.run_dir import Run, find_run
from spikefleet.status import counting
from spikefleet.tasks import AnyTask, build_task
from spikefleet.training.checkpoints import best_network, load_checkpoint
from spikefleet.training.distributed import ProcessGroup, pick_device
from spikefleet.training.evaluation import Evaluation, evaluate
from spikefleet_models.energy import EnergyCard
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Split


@dataclass(frozen=True)
class TrainedNetwork:
    """A network in evaluation mode on the CPU, with what is needed to use it."""

    reference: str
    network: nn.Module
    config: Config
    data: DataSummary
    """What it was trained on."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """As recorded with it, by split and name, such as "test/top1"."""
    card: EnergyCard | None = None
    """As recorded with it."""

    @cached_property
    def task(self) -> AnyTask:
        """The task that it was trained for."""
        return build_task(self.config, self.data)


def open_trained_network(reference: str, runs_dir: Path) -> TrainedNetwork:
    """Loads the network that a reference names; nothing is unpickled, every file is checked against its hash.

    Args:
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, the directory of a pulled package or of a checkpoint,
            or the name of a run (its best checkpoint).

    Raises:
        UserError: there is nothing by that reference, or what is there is damaged.
    """
    if reference.startswith("models:"):
        from spikefleet import registry
        from spikefleet.tracking.mlflow_client import resolve_tracking_uri

        with tempfile.TemporaryDirectory(prefix="spikefleet-") as scratch:
            folder = Path(scratch) / "package"
            registry.pull(reference, folder, tracking_uri=resolve_tracking_uri(runs_dir))
            return _from_package(reference, folder)
    path = Path(reference)
    if (path / CARD).is_file():
        return _from_package(reference, path)
    if path.is_dir() and path.parent.name == "checkpoints":
        return _from_checkpoint(reference, path, Run(path.parent.parent))
    if path.is_dir():
        raise UserError(f"{path} holds neither a registered network ({CARD}) nor a checkpoint of a run")
    run = find_run(runs_dir, reference)
    return _from_checkpoint(reference, run.best_checkpoint(), run)


def _from_package(reference: str, folder: Path) -> TrainedNetwork:
    network, plain = load_network(folder)
    config, data = parse_config(plain, origin=reference), DataSummary.read(folder)
    metrics = {str(name): float(value) for name, value in read_card(folder).facts.get("metrics", {}).items()}
    return TrainedNetwork(reference, network, config, data, metrics, _energy_card(folder))


def _from_checkpoint(reference: str, checkpoint: Path, run: Run) -> TrainedNetwork:
    run.check_plugins()
    snapshot = load_checkpoint(checkpoint)
    config = parse_config(snapshot.config, origin=str(checkpoint))
    network, record = best_network(snapshot, config.model), run.record()
    metrics = {f"val/{name}": float(value) for name, value in record.get("validation", {}).items()}
    metrics |= {f"test/{name}": float(value) for name, value in record.get("test", {}).items()}
    return TrainedNetwork(reference, network, config, run.data(), metrics, _energy_card(run.path / "report"))


def _energy_card(folder: Path) -> EnergyCard | None:
    """The card that lies in a folder, if one does. Raises UserError naming a file that is damaged."""
    path = folder / ENERGY
    if not path.is_file():
        return None
    try:
        return EnergyCard.from_dict(read_json(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def open_split(
    trained: TrainedNetwork, split: str, stores_dir: Path, console: Console, *, data: str | None = None
) -> Split:
    """A split of the network's own data, or of the store `data`.

    Raises UserError when the store holds other classes than the network knows.
    """
    config = trained.config.data
    store = open_data(config.model_copy(update={"store": data}) if data else config, stores_dir, console)
    if store.manifest.class_names != trained.data.class_names:
        raise UserError(
            f"{store.location} has the classes {', '.join(store.manifest.class_names[:5])}, ...; "
            f"{trained.reference} was trained on {', '.join(trained.data.class_names[:5])}, ..."
        )
    if tuple(store.manifest.category_ids or ()) != trained.data.category_ids:
        raise UserError(
            f"{store.location} has other category ids for these classes than the data of {trained.reference}; "
            "figures by class would be wrong"
        )
    return store.split(split)


def evaluate_on_split(
    trained: TrainedNetwork,
    split: str,
    stores_dir: Path,
    console: Console,
    *,
    data: str | None = None,
    gpu: bool = False,
) -> Evaluation[Any, Any]:
    """Runs the network over a split, as `open_split` has it. Raises as that."""
    config = trained.config.data
    rows = open_split(trained, split, stores_dir, console, data=data)
    group = ProcessGroup(0, 1, pick_device(gpu))
    loader = BatchLoader(rows, config.transform, train=False, processes=config.loader_processes)
    with counting(console, f"evaluating {split}") as progress:
        network = trained.network.to(group.device)
        evaluation = evaluate(network, trained.task, loader, trained.config.train, group, progress)
    assert evaluation is not None, "a single process gets its own predictions"
    return evaluation
