"""A proof is kept for good, so only a finding about the network may become one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from spikefleet.certificates.certify import Certificates, certify
from spikefleet.certificates.spike_check import PROOF
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_summary import DataSummary
from spikefleet.runs.run_dir import Run
from spikefleet.training.checkpoints import Snapshot
from spikefleet_models import equivalence
from spikefleet_models.families import build_model
from spikefleet_models.spike_driven import spike_driven
from spikefleet_models.spike_edges import LayerInput
from spikefleet_pipelines.store.reader import Store

FAULTS = [
    RuntimeError("out of memory"),
    torch.OutOfMemoryError("out of memory"),
    ValueError("bad shape"),
    KeyboardInterrupt(),
]


@pytest.fixture
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits", verify=False)


def finished(folder: Path, store: Store, *overrides: str, variance: float = 1.0) -> Run:
    """A run whose best checkpoint holds drawn weights."""
    config = load_config("digits", parse_overrides(["model.stages=[1,1]", "cluster.workers=0", *overrides]))
    run = Run(folder / "run")
    run.begin(config, DataSummary.of(store.manifest))
    torch.manual_seed(0)
    weights = build_model(config.model).state_dict()
    weights["stem.unit.bn.running_var"][0] = variance
    run.checkpoints.save(1, Snapshot({"model": weights}, {"best": {"step": 1}}, config.model_dump(mode="json")))
    return run


def certified(run: Run, store: Store) -> Certificates:
    return certify(run.config(), run.best_checkpoint(), run.path / "report", store)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_proof_that_was_cut_short_is_done_again(
    fault: BaseException, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: nn.Module, inputs: object) -> None:
        raise fault

    def failing(deployed: nn.Module, inputs: Mapping[str, LayerInput]) -> nn.Module:
        binary = spike_driven(deployed, inputs)
        binary.get_submodule("classifier").register_forward_pre_hook(fail)
        return binary

    run = finished(tmp_path, store)
    monkeypatch.setattr(equivalence, "spike_driven", failing)
    with pytest.raises(type(fault)):
        certified(run, store)
    assert not (run.path / "report" / PROOF).exists()
    monkeypatch.undo()
    assert certified(run, store).verdict == "proved"
    assert json.loads((run.path / "report" / PROOF).read_text())["verdict"] == "proved"


def test_a_finding_is_kept(store: Store, tmp_path: Path) -> None:
    run = finished(tmp_path, store, "model.connection=add", "model.stages=[2,1]")
    assert certified(run, store).verdict == "refuted"
    assert "binary events" in json.loads((run.path / "report" / PROOF).read_text())["refusal"]


def test_statistics_that_are_not_finite_are_a_finding(store: Store, tmp_path: Path) -> None:
    """Folding makes them weights of zero, which are finite."""
    run = finished(tmp_path, store, variance=math.inf)
    assert certified(run, store).verdict == "refuted"
    refusal = json.loads((run.path / "report" / PROOF).read_text())["refusal"]
    assert refusal.startswith("stem.unit.bn.running_var holds NaN or infinity")
