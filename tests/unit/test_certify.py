"""A certificate is of one checkpoint, whole, and not made again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from spikefleet.certificates import certify as certification
from spikefleet.certificates.certify import CERTIFICATE, certify
from spikefleet.certificates.energy_card import ENERGY
from spikefleet.certificates.latency import LATENCY
from spikefleet.certificates.spike_check import PROOF
from spikefleet.errors import UserError
from spikefleet.files import read_json, sha256_of, write_json
from spikefleet.registry.package import load_network, write_package
from spikefleet.runs.run_dir import Run
from spikefleet.training.checkpoints import CheckpointFolder, Snapshot, best_network, best_weights, load_checkpoint
from spikefleet_pipelines.store.reader import Store

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format_1" / "run"


class Certified:
    """A run whose certifications are counted."""

    def __init__(self, run: Run, store: Store, patch: pytest.MonkeyPatch) -> None:
        self.run, self.store, self.checks = run, store, 0
        self.report = run.path / "report"
        check = certification.check_spikes  # type: ignore[attr-defined]

        def counted(*parts: object, **options: object) -> object:
            self.checks += 1
            return check(*parts, **options)  # type: ignore[arg-type]

        patch.setattr(certification, "check_spikes", counted)

    def again(self) -> str:
        checkpoint = self.run.checkpoints.latest()
        assert checkpoint is not None
        return certify(self.run.config(), checkpoint, self.report, self.store).verdict


@pytest.fixture
def certified(stores_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Certified:
    shutil.copytree(FIXTURE, tmp_path / "run")
    one = Certified(Run(tmp_path / "run"), Store.open(stores_dir / "digits", verify=False), monkeypatch)
    assert one.again() == "proved"
    return one


def test_what_is_certified_is_read(certified: Certified) -> None:
    assert certified.again() == "proved"
    assert certified.checks == 1


@pytest.mark.parametrize("name", [PROOF, ENERGY, CERTIFICATE])
def test_a_file_that_is_missing_or_was_changed_is_made_again(certified: Certified, name: str) -> None:
    written = (certified.report / name).read_bytes()
    (certified.report / name).unlink()
    certified.again()
    (certified.report / name).write_text("{}")
    certified.again()
    assert certified.checks == 3
    if name == PROOF:
        assert (certified.report / name).read_bytes() == written


def test_another_checkpoint_is_certified_for_itself(certified: Certified) -> None:
    latest = certified.run.checkpoints.latest()
    assert latest is not None
    manifest = read_json(latest / "checkpoint.json")
    write_json(latest / "checkpoint.json", {**manifest, "versions": {"torch": "another"}})
    certified.again()
    assert certified.checks == 2


def test_a_certification_that_is_interrupted_leaves_no_certificate(
    certified: Certified, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*parts: object, **options: object) -> None:
        raise KeyboardInterrupt

    (certified.report / CERTIFICATE).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(certification, "measure_energy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            certified.again()
    assert not (certified.report / CERTIFICATE).exists()
    assert certified.again() == "proved"
    assert certified.checks == 3


def test_weights_that_were_changed_later_are_not_certified(certified: Certified) -> None:
    latest = certified.run.checkpoints.latest()
    assert latest is not None
    weights = latest / "average.safetensors"
    assert best_weights(latest) == weights
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    for use in (certified.again, lambda: best_weights(latest)):
        with pytest.raises(UserError, match=r"average.safetensors is damaged"):
            use()


def test_a_file_that_the_manifest_does_not_list_is_not_the_weights(tmp_path: Path) -> None:
    """The certificate is of what the manifest lists."""
    path = CheckpointFolder(tmp_path).save(1, Snapshot({"model": {"w": torch.zeros(2)}}, {}, {}))
    shutil.copyfile(path / "model.safetensors", path / "average.safetensors")
    assert best_weights(path) == path / "model.safetensors"


def test_a_certificate_of_an_earlier_version_is_still_read(certified: Certified) -> None:
    """It had neither legs nor metrics of this name."""
    shutil.copyfile(FIXTURE.parent / "model" / "artifacts" / PROOF, certified.report / PROOF)
    record = read_json(certified.report / CERTIFICATE)
    record["sha256"][PROOF] = sha256_of(certified.report / PROOF)
    write_json(certified.report / CERTIFICATE, record)
    latest = certified.run.checkpoints.latest()
    assert latest is not None
    found = certify(certified.run.config(), latest, certified.report, certified.store)
    assert (found.verdict, found.legs, certified.checks) == ("proved", {}, 1)


@pytest.mark.parametrize("averaged", [False, True])
def test_what_is_packaged_is_the_network_that_was_certified(
    certified: Certified, averaged: bool, tmp_path: Path
) -> None:
    config, latest = certified.run.config(), certified.run.checkpoints.latest()
    assert latest is not None
    weights = dict(load_checkpoint(latest).tensors["model"])
    tensors = {"model": weights}
    if averaged:
        tensors["average"] = {name: value * 0.5 for name, value in weights.items() if value.is_floating_point()} | {
            name: value for name, value in weights.items() if not value.is_floating_point()
        }
    path = CheckpointFolder(tmp_path / "other").save(1, Snapshot(tensors, {}, config.model_dump(mode="json")))
    (tmp_path / "package").mkdir()
    write_package(tmp_path / "package", best_weights(path), config.dump(), {}, {})
    packaged, _ = load_network(tmp_path / "package")
    trained = best_network(load_checkpoint(path), config.model).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in packaged.state_dict().items())
    assert any(not torch.equal(value, weights[name]) for name, value in trained.items()) == averaged


def test_the_latency_is_measured_once_for_a_checkpoint(certified: Certified) -> None:
    checkpoint = certified.run.checkpoints.latest()
    assert checkpoint is not None
    parts = certified.run.config(), checkpoint, certified.report, certified.store
    found = certify(*parts)
    assert certified.report / LATENCY in found.files
    assert certify(*parts).latency == found.latency
    recorded = read_json(certified.report / LATENCY)
    write_json(certified.report / LATENCY, {**recorded, "checkpoint": "0" * 64, "median_ms": 1e6})
    assert certify(*parts).latency.median_ms < 1e6
    assert certified.checks == 1
