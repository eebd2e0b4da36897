"""Batch norm's running statistics are those of all ranks: after each step, in evaluations and in checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.tasks import build_task
from spikefleet.training import step
from spikefleet.training.checkpoints import Snapshot, best_network, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.evaluation import evaluate
from spikefleet.training.rank_statistics import average_statistics
from spikefleet_models.families import build_model
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.store.reader import Store
from support.ranks import GroupRun, run_undisturbed
from support.snapshots import end_of

RANKS = 3
# A rate at which no weight moves.
SETTINGS = [
    "model.width=0.125",
    "model.timesteps=2",
    "model.norm_momentum=0.3",
    "train.epochs=1",
    "train.global_batch=60",
    "train.ema_decay=0.5",
    "optim.lr=1.0e-30",
    "optim.warmup_epochs=0",
    "optim.weight_decay=0",
    f"cluster.workers={RANKS}",
]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("digits", parse_overrides(SETTINGS))


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Path:
    return stores_dir / "digits"


@pytest.fixture(scope="module")
def trained(config: Config, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GroupRun]:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    return run_dir, run_undisturbed(config, store, run_dir)


def keep_statistics_apart() -> None:
    """A rank whose statistics are of its own images, as rank 0's were when they were copied to all."""

    def nothing(*arguments: Any) -> None:
        return None

    step.average_statistics = nothing  # type: ignore[assignment, attr-defined]


@pytest.fixture(scope="module")
def apart(config: Config, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The end of the same training with the statistics of rank 0 alone."""
    run_dir = tmp_path_factory.mktemp("apart") / "run"
    run_undisturbed(config, store, run_dir, prepare=keep_statistics_apart)
    return end_of(run_dir)


@pytest.fixture(scope="module")
def replicas(config: Config, store: Path) -> list[nn.Module]:
    """What each rank measures on its own images, played in this process one rank after the other."""
    split = Store.open(store).split("train")
    torch.manual_seed(config.train.seed)
    networks = [build_model(config.model).train()]
    networks += [copy.deepcopy(networks[0]) for _ in range(RANKS - 1)]
    for rank, network in enumerate(networks):
        plan = EpochPlan(samples=len(split), global_batch=60, world_size=RANKS, rank=rank)
        loader = BatchLoader(split, config.data.transform, train=True)
        with torch.no_grad():
            for batch in loader.epoch(plan, epoch=0):
                network(batch.images)
    return networks


def moments(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.endswith(("running_mean", "running_var"))}


def test_a_checkpoint_has_the_mean_of_what_the_ranks_measured(
    trained: tuple[Path, GroupRun], apart: Snapshot, replicas: list[nn.Module]
) -> None:
    end = end_of(trained[0]).tensors["model"]
    own = [moments(network.state_dict()) for network in replicas]
    found, alone = moments(dict(end)), moments(dict(apart.tensors["model"]))
    assert len(found) > 10
    for key, value in found.items():
        torch.testing.assert_close(value, torch.stack([rank[key] for rank in own]).mean(0), rtol=1e-4, atol=1e-5)
    # Without the averaging they are those of rank 0, and none of a single rank comes near.
    for key, value in alone.items():
        torch.testing.assert_close(value, own[0][key], rtol=1e-4, atol=1e-5)
    for rank in own:
        errors = [float((rank[key] - found[key]).norm() / found[key].norm()) for key in found]
        assert np.median(errors) > 0.02
    # Nothing but the statistics moved, and counters count steps, not ranks.
    assert {int(value) for key, value in end.items() if key.endswith("num_batches_tracked")} == {22}
    weights = [key for key in end if key.endswith("weight")]
    assert all(torch.equal(end[key], apart.tensors["model"][key]) for key in weights)


def test_the_ema_follows_the_mean(trained: tuple[Path, GroupRun], apart: Snapshot) -> None:
    """Its statistics lag behind those of the network by half a step's difference, far less than rank 0's are off."""
    end = end_of(trained[0]).tensors
    model, average = moments(dict(end["model"])), moments(dict(end["average"]))
    alone = moments(dict(apart.tensors["average"]))
    assert not any(torch.equal(model[key], average[key]) for key in model)
    lags, errors = (
        np.median([float((other[key] - model[key]).norm() / model[key].norm()) for key in model])
        for other in (average, alone)
    )
    assert lags < errors


def test_the_evaluation_of_a_run_is_that_of_its_checkpoint(
    config: Config, store: Path, trained: tuple[Path, GroupRun], apart: Snapshot
) -> None:
    """One process with the weights of the checkpoint finds what three ranks found; with one rank's statistics not."""
    outcome = trained[1].outcomes[0]
    assert all(other.test == outcome.test for other in trained[1].outcomes)
    opened = Store.open(store)
    task = build_task(config, DataSummary.of(opened.manifest))
    loader = BatchLoader(opened.split("test"), config.data.transform, train=False)

    def probabilities(snapshot: Snapshot) -> tuple[list[object], float]:
        network = best_network(snapshot, config.model)
        found = evaluate(network, task, loader, config.train, ProcessGroup.single())
        assert found is not None
        return [one.probabilities for one in found.predictions], task.metrics(found.predictions, found.targets)["top1"]

    averaged, top1 = probabilities(load_checkpoint(Path(outcome.best_checkpoint)))
    assert top1 == outcome.test["top1"]
    assert probabilities(apart)[0] != averaged


# -------------------------------------------------------------------------------------------------- the mean itself


class Ranks(ProcessGroup):
    """All-reduce over ranks of which this process plays one: the sums of the others are known."""

    def __new__(cls, others: list[Tensor]) -> Ranks:
        return super().__new__(cls)

    def __init__(self, others: list[Tensor]) -> None:
        super().__init__(0, 1 + len(others), torch.device("cpu"))
        object.__setattr__(self, "others", others)

    def all_reduce(self, values: Tensor) -> Tensor:
        others: list[Tensor] = self.others  # type: ignore[attr-defined]
        assert values.ndim == 1
        assert values.dtype == torch.float64
        return values + torch.stack([torch.as_tensor(other).expand_as(values) for other in others]).sum(0)


def norms() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(50), nn.Conv2d(1, 1, 1), nn.BatchNorm1d(1, affine=False))
    with torch.no_grad():
        for buffer in network.buffers():
            buffer.copy_(torch.rand(buffer.shape) * 7)
    return network


@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_buffers_stay_as_they_are(size: int) -> None:
    network = norms()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    flat = torch.cat([buffer.double().flatten() for buffer in network.buffers() if buffer.is_floating_point()])
    average_statistics(network, Ranks([flat] * (size - 1)))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_mean_is_that_of_each_buffer() -> None:
    network = norms()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    average_statistics(network, Ranks([torch.tensor(3.0, dtype=torch.float64)]))
    for key, value in network.state_dict().items():
        expected = (before[key] + 3) / 2 if key.endswith(("running_mean", "running_var")) else before[key]
        assert torch.equal(value, expected), key
    average_statistics(network, ProcessGroup.single())


def test_the_mean_over_ranks_is_the_moving_average_of_all_images() -> None:
    """Of the mean exactly; one rank of eight with 2 images is far from it."""
    torch.manual_seed(0)
    steps = torch.randn(400, 16, 3) * torch.tensor([1.0, 3.0, 0.2]) + 5
    whole, ranks = nn.BatchNorm1d(3), [nn.BatchNorm1d(3) for _ in range(8)]
    for images in steps:
        whole(images)
        for rank, norm in enumerate(ranks):
            norm(images[2 * rank : 2 * rank + 2])
    means, variances = (
        torch.stack([getattr(norm, name) for norm in ranks]) for name in ("running_mean", "running_var")
    )
    assert whole.running_mean is not None
    assert whole.running_var is not None
    torch.testing.assert_close(means.mean(0), whole.running_mean, rtol=1e-4, atol=1e-4)
    assert float((means - whole.running_mean).abs().max()) > 0.3
    worst = (variances / whole.running_var - 1).abs().max()
    assert float((variances.mean(0) / whole.running_var - 1).abs().max()) < float(worst) / 3
