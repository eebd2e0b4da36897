"""Certifies a run's best checkpoint before it is registered: the spike check, the energy card and the latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from spikefleet.certificates.energy_card import ENERGY, measure_energy, read_card, write_card
from spikefleet.certificates.latency import LATENCY, Latency, latency_on
from spikefleet.certificates.metric_leg import affordable_images
from spikefleet.certificates.spike_check import PROOF, check_spikes
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json, read_json_object, sha256_of, write_json
from spikefleet.status import Announce, silent
from spikefleet.tasks import build_task
from spikefleet.training.checkpoints import best_network, checkpoint_hash, load_checkpoint, verify_checkpoint
from spikefleet.training.evaluation import first_batches
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Samples, Store

CERTIFICATE = "certificate.json"
"""Written last: the hash of the certified checkpoint, and the hashes of the certificate files."""


@dataclass(frozen=True)
class Certificates:
    """The verdict of the spike check (`verdict.py`), energy and latency of one image, and the certificate files."""

    verdict: str
    energy_mj: float
    latency: Latency
    files: tuple[Path, ...]
    legs: Mapping[str, str] = field(default_factory=dict)
    """What each leg of the proof found, and which layers were silent, in words; by tag."""


def certify(config: Config, checkpoint: Path, report: Path, store: Store, announce: Announce = silent) -> Certificates:
    """Checks a checkpoint and measures its energy and latency on validation images, unless an earlier call did.

    Without a validation split, on training images: no figure that is reported may depend on test images.

    Args:
        config: configuration of the run.
        checkpoint: directory of the run's best checkpoint.
        report: directory for the proof and the card.
        store: data of the run.
        announce: called with what begins: the spike check, the measurement of energy and of latency.

    Returns:
        The verdict, the energy, the latency and the files.

    Raises:
        UserError: the checkpoint is damaged.
    """
    proof, energy = report / PROOF, report / ENERGY
    files = (proof, energy, energy.with_suffix(".png"))
    verify_checkpoint(checkpoint)  # its weights are about to be registered
    certified = checkpoint_hash(checkpoint)
    if not _is_certified(report, certified, files):
        (report / CERTIFICATE).unlink(missing_ok=True)
        network = best_network(load_checkpoint(checkpoint), config.model)
        task = build_task(config, DataSummary.of(store.manifest))
        split = certified_split(store)
        announce("spike check")
        measured = measured_images(network, config, store)
        check_spikes(network, task, config, split, measured=measured).write(proof)
        announce("measuring energy")
        write_card(measure_energy(network, config.transform, split), report)
        hashes = {file.name: sha256_of(file) for file in files}
        write_json(report / CERTIFICATE, {"checkpoint": certified, "split": split.name, "sha256": hashes})
    latency = _latency(config, checkpoint, certified, report, store, announce)
    found = read_json_object(proof, "verdict")
    every = (*files, report / LATENCY)
    return Certificates(str(found["verdict"]), read_card(energy).energy_mj, latency, every, _tags(found))


def _latency(
    config: Config, checkpoint: Path, certified: str, report: Path, store: Store, announce: Announce
) -> Latency:
    """The latency of a checkpoint, measured once: its registration, if it is repeated, has the same files."""
    path = report / LATENCY
    try:
        recorded = read_json_object(path, "checkpoint")
        if recorded["checkpoint"] == certified:
            return Latency.from_dict(recorded)
    except UserError:  # missing, or not the file that was written
        pass
    announce("measuring latency")
    network = best_network(load_checkpoint(checkpoint), config.model)
    latency = latency_on(network, config, certified_split(store))
    write_json(path, {**latency.to_dict(), "checkpoint": certified})
    return latency


def certified_split(store: Store) -> Samples:
    """The split on whose images certificates are made: val, or train without one, never test."""
    return store.samples("val" if "val" in store.manifest.splits else "train")


def measured_images(network: nn.Module, config: Config, store: Store) -> int:
    """Images on which a certification compares metrics."""
    loader = BatchLoader(certified_split(store), config.transform, train=False)
    image = next(first_batches(loader, 1, 1)).network_input
    return affordable_images(network, image, config, len(store.samples("train")))


def _tags(found: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a spike check; its file may be of a version that had no legs."""
    tags = {f"proof_{leg['name']}": str(leg["says"]) for leg in found.get("legs", ())}
    if found.get("silent"):
        tags["proof_alone"] = f"no spike came on these images to {found['silent']}"
    return tags


def _is_certified(report: Path, checkpoint: str, files: tuple[Path, ...]) -> bool:
    """Whether the report holds the unchanged files of a finished certification of this checkpoint."""
    try:
        record = read_json(report / CERTIFICATE)
        return bool(
            record["checkpoint"] == checkpoint and all(sha256_of(file) == record["sha256"][file.name] for file in files)
        )
    except (ValueError, OSError, KeyError, TypeError):  # no certificate yet, or a file is missing
        return False
