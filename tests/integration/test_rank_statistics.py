"""Batch norm's running statistics are those of all ranks: in evaluations, in checkpoints, and after a resumption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.tasks import build_task
from spikefleet.training import state
from spikefleet.training.checkpoints import Snapshot, best_network, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.evaluation import evaluate
from spikefleet.training.rank_statistics import averaged_statistics, mean_statistics
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Store
from support.ranks import GroupRun, leave, run_ranks
from support.snapshots import cut, differences, end_of

SETTINGS = [
    "model.width=0.125",
    "model.timesteps=2",
    "train.epochs=1",
    "train.global_batch=60",
    "train.ema_decay=0.5",
    "checkpoint.every_steps=8",
    "checkpoint.keep_last=9",
    "cluster.workers=3",
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
    run = run_ranks(config, store, run_dir)
    assert run.exit_codes == [[0, 0, 0]], run.log
    return run_dir, run


def of_rank(end: Snapshot, rank: int, name: str) -> dict[str, torch.Tensor]:
    prefix = f"{rank}/{name}/"
    return {key[len(prefix) :]: value for key, value in end.tensors["statistics"].items() if key.startswith(prefix)}


def with_statistics(end: Snapshot, name: str, own: Mapping[str, torch.Tensor]) -> Snapshot:
    return Snapshot({**end.tensors, name: {**end.tensors[name], **own}}, end.state, end.config)


@pytest.mark.parametrize("name", ["model", "average"])
def test_a_checkpoint_has_the_mean_of_the_ranks(trained: tuple[Path, GroupRun], name: str) -> None:
    end = end_of(trained[0])
    ranks = [of_rank(end, rank, name) for rank in range(3)]
    assert any(key.endswith("running_var") for key in ranks[0])
    assert not any(key.endswith("num_batches_tracked") for key in ranks[0])
    for key, value in ranks[0].items():
        mean = torch.stack([rank[key].double() for rank in ranks]).mean(0)
        torch.testing.assert_close(end.tensors[name][key].double(), mean, rtol=1e-6, atol=0)
        assert value.dtype == end.tensors[name][key].dtype
    # No rank alone would have given it.
    moments = [key for key in ranks[0] if key.endswith("running_mean")]
    for rank in ranks:
        assert not any(torch.equal(rank[key], end.tensors[name][key]) for key in moments)
    counters = {key: tensor for key, tensor in end.tensors["model"].items() if key.endswith("num_batches_tracked")}
    assert {int(tensor) for tensor in counters.values()} == {len(trained[1].outcomes[0].history) * 22}


def test_the_evaluation_of_a_run_is_that_of_its_checkpoint(
    config: Config, store: Path, trained: tuple[Path, GroupRun]
) -> None:
    """One process with the weights of the checkpoint finds what three ranks found; with one rank's statistics not."""
    outcome = trained[1].outcomes[0]
    end, opened = load_checkpoint(Path(outcome.best_checkpoint)), Store.open(store)
    task = build_task(config, DataSummary.of(opened.manifest))
    loader = BatchLoader(opened.split("test"), config.data.transform, train=False)

    def probabilities(snapshot: Snapshot) -> tuple[list[object], float]:
        network = best_network(snapshot, config.model)
        found = evaluate(network, task, loader, config.train, ProcessGroup.single())
        assert found is not None
        return [one.probabilities for one in found.predictions], task.metrics(found.predictions, found.targets)["top1"]

    averaged, top1 = probabilities(end)
    assert top1 == outcome.test["top1"]
    for rank in range(3):
        assert probabilities(with_statistics(end, "average", of_rank(end, rank, "average")))[0] != averaged


def forget_own_statistics() -> None:
    """Ranks that resume with the mean, as if a checkpoint held nothing else."""

    def nothing(*arguments: object) -> None:
        return None

    state.set_statistics = nothing  # type: ignore[assignment, attr-defined]


def test_each_rank_resumes_with_its_own(
    config: Config, store: Path, trained: tuple[Path, GroupRun], tmp_path: Path
) -> None:
    end = end_of(trained[0])
    stopped = run_ranks(config, store, tmp_path / "stopped", [leave(rank=1, step=12)])
    assert stopped.restarts == 1
    assert differences(end_of(tmp_path / "stopped"), end) == []
    cut(trained[0], 16, tmp_path / "forgetful")
    assert run_ranks(config, store, tmp_path / "forgetful", prepare=forget_own_statistics).finished
    found = differences(end_of(tmp_path / "forgetful"), end)
    assert any(told.startswith("statistics: ") for told in found)
    assert any(told.startswith("model: ") and told.endswith("running_mean") for told in found)
    assert not any(told.endswith("weight") for told in found), "training normalises with the batch's own statistics"


def test_how_often_checkpoints_are_saved_changes_no_bit(
    config: Config, store: Path, trained: tuple[Path, GroupRun], tmp_path: Path
) -> None:
    seldom = load_config("digits", parse_overrides([*SETTINGS, "checkpoint.every_steps=null"]))
    assert run_ranks(seldom, store, tmp_path / "run").finished
    assert differences(end_of(tmp_path / "run"), end_of(trained[0])) == []


class Ranks(ProcessGroup):
    """All-reduce over ranks of which this process plays one: the sums of the others are known."""

    def __new__(cls, size: int) -> Ranks:
        return super().__new__(cls)

    def __init__(self, size: int) -> None:
        super().__init__(0, size, torch.device("cpu"))

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.size


@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_buffers_stay_as_they_are(size: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(50), nn.BatchNorm1d(1, affine=False))
    with torch.no_grad():
        for buffer in network.buffers():
            buffer.copy_(torch.rand(buffer.shape) * 7)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    mean = mean_statistics({"model": network}, Ranks(size))["model"]
    assert all(torch.equal(value, before[key]) for key, value in mean.items())
    with averaged_statistics(network, Ranks(size)):
        pass
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


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
    torch.testing.assert_close(means.mean(0), whole.running_mean, rtol=1e-4, atol=1e-4)
    assert float((means - whole.running_mean).abs().max()) > 0.3  # type: ignore[operator]
    error = (variances / whole.running_var - 1).abs()  # type: ignore[operator]
    assert float((variances.mean(0) / whole.running_var - 1).abs().max()) < float(error.max()) / 3  # type: ignore[operator]
