"""Certifies a run's best checkpoint before it is registered: the spike check and the energy card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spikefleet.certificates.energy_card import ENERGY, measure_energy, read_card, write_card
from spikefleet.certificates.spike_check import PROOF, check_spikes
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.files import read_json, read_json_object, sha256_of, write_json
from spikefleet.status import Announce, silent
from spikefleet.tasks import build_task
from spikefleet.training.checkpoints import best_network, checkpoint_hash, load_checkpoint, verify_checkpoint
from spikefleet_pipelines.store.reader import Store

CERTIFICATE = "certificate.json"
"""Written last: the hash of the certified checkpoint, and the hashes of the certificate files."""


@dataclass(frozen=True)
class Certificates:
    """The verdict of the spike check (`verdict.py`), the energy per image in mJ, and the certificate files."""

    verdict: str
    energy_mj: float
    files: tuple[Path, ...]


def certify(config: Config, checkpoint: Path, report: Path, store: Store, announce: Announce = silent) -> Certificates:
    """Checks a checkpoint and measures its energy on validation images, unless an earlier call did.

    Args:
        config: configuration of the run.
        checkpoint: directory of the run's best checkpoint.
        report: directory for the proof and the card.
        store: data of the run.
        announce: called with what begins: the spike check, the measurement of energy.

    Returns:
        The verdict, the energy and the files.

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
        announce("spike check")
        check_spikes(network, task, config, store.split("val")).write(proof)
        announce("measuring energy")
        write_card(measure_energy(network, config.data.transform, store.split("val")), report)
        write_json(
            report / CERTIFICATE,
            {"checkpoint": certified, "sha256": {file.name: sha256_of(file) for file in files}},
        )
    return Certificates(str(read_json_object(proof, "verdict")["verdict"]), read_card(energy).energy_mj, files)


def _is_certified(report: Path, checkpoint: str, files: tuple[Path, ...]) -> bool:
    """Whether the report holds the unchanged files of a finished certification of this checkpoint."""
    try:
        record = read_json(report / CERTIFICATE)
        return bool(
            record["checkpoint"] == checkpoint and all(sha256_of(file) == record["sha256"][file.name] for file in files)
        )
    except (ValueError, OSError, KeyError, TypeError):  # no certificate yet, or a file is missing
        return False
