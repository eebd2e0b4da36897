"""A proof is kept for good, so only a finding about the network may become one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikefleet.certificates import spike_check
from spikefleet.certificates.certify import Certificates, certify
from spikefleet.certificates.metric_leg import MetricLeg, affordable_images
from spikefleet.certificates.spike_check import PROOF, check_spikes
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_summary import DataSummary
from spikefleet.runs.run_dir import Run
from spikefleet.tasks import build_task
from spikefleet.training.checkpoints import Snapshot
from spikefleet.training.evaluation import first_batches
from spikefleet_models import equivalence
from spikefleet_models.families import build_model
from spikefleet_models.reparam import deploy
from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_models.spike_driven import spike_driven
from spikefleet_models.spike_edges import LayerInput
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Store
from support.snapshots import small_snapshot

FAULTS = [
    RuntimeError("out of memory"),
    torch.OutOfMemoryError("out of memory"),
    ValueError("bad shape"),
    KeyboardInterrupt(),
]


@pytest.fixture
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits", verify=False)


Change = Callable[[dict[str, Tensor]], object]


def finished(folder: Path, store: Store, *overrides: str, change: Change = lambda weights: None) -> Run:
    """A run whose best checkpoint holds drawn weights, changed by `change`."""
    config = load_config("digits", parse_overrides(["model.stages=[1,1]", "cluster.workers=0", *overrides]))
    run = Run(folder / "run")
    run.begin(config, DataSummary.of(store.manifest))
    torch.manual_seed(0)
    weights = build_model(config.model).state_dict()
    change(weights)
    state = small_snapshot(best_step=1).state
    run.checkpoints.save(1, Snapshot({"model": weights}, state, config.model_dump(mode="json")))
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
    run = finished(tmp_path, store, change=lambda weights: weights["stem.unit.bn.running_var"].fill_(math.inf))
    assert certified(run, store).verdict == "refuted"
    refusal = json.loads((run.path / "report" / PROOF).read_text())["refusal"]
    assert refusal.startswith("stem.unit.bn.running_var holds NaN or infinity")


def found(run: Run) -> dict[str, Any]:
    """The spike check of a run's report."""
    content: dict[str, Any] = json.loads((run.path / "report" / PROOF).read_text())
    return content


def test_each_leg_has_its_verdict_and_its_largest_difference(store: Store, tmp_path: Path) -> None:
    run = finished(tmp_path, store)
    certificates = certified(run, store)
    check = found(run)
    assert [(leg["name"], leg["verdict"]) for leg in check["legs"]] == [
        ("deployed", "equal"),
        ("binary", "equal"),
        ("metric", "equal"),
    ]
    deployed, binary, metric = (leg["max_difference"] for leg in check["legs"])
    assert 0 < deployed < 1e-10
    assert deployed == check["proof"]["deployment"]["max_difference"]
    assert (binary, metric) == (0, pytest.approx(abs(check["metrics"]["difference"])))
    assert check["metrics"]["trained"]["top1"] == check["metrics"]["binary"]["top1"]
    assert check["metrics"]["images"] == len(store.split("val"))
    assert certificates.legs["proof_metric"].startswith("top1 (float32, 143 images): trained network 0.")
    assert set(certificates.legs) - {"proof_alone"} == {"proof_deployed", "proof_binary", "proof_metric"}


def test_a_batch_norm_lost_in_deployment_is_refuted_by_the_name_of_its_layer(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(network: nn.Module) -> nn.Module:
        deployed = deploy(network)
        nn.init.zeros_(deployed.get_submodule("stages.1.0.convs.0").get_parameter("bias"))
        return deployed

    def shifted(weights: dict[str, Tensor]) -> None:
        weights["stages.1.0.units.0.bn.bias"].fill_(0.3)

    run = finished(tmp_path, store, change=shifted)
    monkeypatch.setattr(spike_check, "deploy", lossy)
    assert certified(run, store).verdict == "refuted"
    assert "computed by stages.1.0.convs.0, differs from the trained network's by 0.3" in found(run)["why"]
    assert [leg["verdict"] for leg in found(run)["legs"]][:2] == ["differs", "equal"]


def test_the_same_output_for_every_image_shows_nothing_and_silent_layers_are_named(
    store: Store, tmp_path: Path
) -> None:
    run = finished(tmp_path, store, change=lambda weights: weights["stem.unit.bn.bias"].fill_(-100.0))
    certificates = certified(run, store)
    assert certificates.verdict == "not shown"
    assert "the same for every image" in found(run)["why"]
    assert found(run)["looked_at"] == len(store.split("val"))
    assert "stages.0.0.convs.0" in certificates.legs["proof_alone"]
    assert found(run)["proof"]["passed"]  # of equality


def test_a_binary_form_that_answers_worse_in_the_served_type_is_refuted(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both proofs in fp64 pass; only the metric can tell."""
    config = load_config("digits", parse_overrides(["model.stages=[1,1]", "cluster.workers=0"]))
    val, task = store.split("val"), build_task(config, DataSummary.of(store.manifest))
    torch.manual_seed(0)
    network = build_model(config.model).eval()
    batch = next(first_batches(BatchLoader(val, config.data.transform, train=False), len(val), len(val)))
    features: list[Tensor] = []
    hook = network.classifier.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    with torch.no_grad():
        network(batch.images)
        hook.remove()
        wanted = torch.eye(10)[torch.tensor(task.targets(batch))]
        fit = torch.linalg.lstsq(torch.cat((features[0], torch.ones(len(wanted), 1)), 1), wanted).solution
        network.classifier.weight.copy_(fit[:-1].t())
        network.classifier.bias.copy_(fit[-1])
    right = check_spikes(network, task, config, val, measured=64)
    assert right.verdict == "proved"
    assert right.metrics is not None
    assert right.metrics.trained["top1"] > 0.5

    def forgetful(deployed: nn.Module, inputs: Mapping[str, LayerInput]) -> nn.Module:
        binary = spike_driven(deployed, inputs)
        nn.init.zeros_(binary.get_submodule("classifier").get_parameter("weight"))
        return binary

    monkeypatch.setattr(spike_check, "spike_driven", forgetful)
    wrong = check_spikes(network, task, config, val, measured=64)
    assert wrong.proof is not None
    assert wrong.proof.passed
    assert wrong.verdict == "refuted"
    assert str(wrong.why).startswith("top1 of the binary form in float32 differs by -0.")


def test_flips_that_cannot_be_counted_leave_the_metric_leg(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncountable(*given: object) -> None:
        raise NotSpikeDrivenError("in 16 bits another layer runs")

    monkeypatch.setattr(spike_check, "count_flips", uncountable)
    run = finished(tmp_path, store)
    certificates = certified(run, store)
    assert certificates.verdict == "proved"
    assert "proof_metric" in certificates.legs
    assert (found(run)["flips"], found(run)["remark"]) == ([], "in 16 bits another layer runs")


def test_few_images_are_measured_where_a_training_is_short_or_slots_are_many(store: Store) -> None:
    image = torch.zeros(1, 1, 8, 8)

    def count(train_samples: int, *overrides: str) -> int:
        config = load_config("digits", parse_overrides(["model.stages=[1,1]", *overrides]))
        return affordable_images(build_model(config.model).eval(), image, config, train_samples)

    ilif = ["model.connection=post_add", "model.neuron.kind=ilif"]
    assert count(1437) == 256
    assert count(1437, "train.epochs=2") == 3 * 2 * 1437 // 50 // 2
    assert count(10, "train.epochs=24") == 7
    assert count(1437, *ilif, "model.neuron.bound=100", "train.epochs=24") == 3 * 24 * 1437 // 50 // 101
    assert count(10, *ilif, "model.neuron.bound=100") == 4


def test_a_metric_may_differ_by_what_its_images_cannot_tell() -> None:
    leg = MetricLeg("top1", {"top1": 0.9, "top5": 1.0}, {"top1": 0.85, "top5": 1.0}, 99)
    assert leg.passed
    assert leg.max_difference == pytest.approx(0.05)
    assert leg.tolerance == pytest.approx(0.5 / 99**0.5)
    assert not MetricLeg("top1", {"top1": 0.9}, {"top1": 0.85}, 101).passed
    assert not MetricLeg("top1", {"top1": 0.9}, {"top1": math.nan}, 4).passed
