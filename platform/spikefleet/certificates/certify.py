"""What a finished run shows before its best checkpoint may become champion: the spike check and the energy card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spikefleet.certificates.energy_card import ENERGY, measure_energy, write_card
from spikefleet.certificates.spike_check import PROOF, check_spikes
from spikefleet.config.schema import Config
from spikefleet.files import read_json
from spikefleet.inference.trained_network import best_network
from spikefleet.runs.run_dir import Run
from spikefleet.tasks import build_task
from spikefleet.training.checkpoints import load_checkpoint
from spikefleet_pipelines.store.reader import Store


@dataclass(frozen=True)
class Certificates:
    """The verdict of the spike check (`proved`, `refuted`, `not spiking`) and the energy of a picture."""

    verdict: str
    energy_mj: float
    files: tuple[Path, ...]


def certify(config: Config, run: Run, store: Store) -> Certificates:
    """Checks and measures the best checkpoint on validation pictures, unless the run's report has both already."""
    report = run.path / "report"
    proof, energy = report / PROOF, report / ENERGY
    if not (proof.is_file() and energy.is_file()):
        network = best_network(load_checkpoint(run.best_checkpoint()), config)
        task = build_task(config, store.manifest.class_names, store.manifest.category_ids or ())
        check_spikes(network, task, config, store.split("val")).write(proof)
        write_card(measure_energy(network, config, store.split("val")), report)
    return Certificates(
        read_json(proof)["verdict"],
        float(read_json(energy)["totals"]["energy_mj"]),
        (proof, energy, energy.with_suffix(".png")),
    )
