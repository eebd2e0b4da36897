"""The loss of a detector is that of the global batch, however its images are spread over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from spikefleet.config.recipes import load_config, parse_config
from spikefleet.config.renamed import with_current_keys
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.step import _Divisor
from spikefleet_models import build_model, model_config
from spikefleet_models.detection import Objects

IMAGES = 4
SIZE = (64, 64)


class Ranks(ProcessGroup):
    """All-reduce over ranks that this process plays one after the other: their counts are known before."""

    def __new__(cls, others: Tensor) -> Ranks:
        return super().__new__(cls)

    def __init__(self, others: Tensor) -> None:
        super().__init__(0, 2, torch.device("cpu"))
        object.__setattr__(self, "others", others)

    def all_reduce(self, values: Tensor) -> Tensor:
        others: Tensor = self.others  # type: ignore[attr-defined]
        return values + others


def scene(name: str) -> tuple[nn.Module, Tensor, list[Objects]]:
    """An fp64 network on running statistics, images, and objects that are spread unevenly."""
    torch.manual_seed(0)
    network = build_model(model_config(name, num_classes=3)).double().eval()
    boxes = [
        [[8.0, 8.0, 40.0, 40.0], [20.0, 4.0, 60.0, 30.0], [2.0, 30.0, 30.0, 62.0]],
        [[10.0, 10.0, 50.0, 60.0]],
        [],
        [],
    ]
    objects = [Objects(torch.tensor(one).reshape(-1, 4), torch.arange(len(one)) % 3) for one in boxes]
    return network, torch.rand(IMAGES, 3, *SIZE, dtype=torch.float64), objects


def gradient(network: nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    network.zero_grad()
    return found


def sums(network: nn.Module, images: Tensor, objects: Sequence[Objects]) -> dict[str, Tensor]:
    criterion = network.config.build_criterion()  # type: ignore[union-attr, operator]
    values: dict[str, Tensor] = criterion.loss(network(images), objects, SIZE, divided=False)
    return values


@pytest.mark.parametrize("name", ["spike_yolo_tiny", "retinanet_tiny"])
@pytest.mark.parametrize("parts", [(2, 2), (1, 3), (3, 1)], ids=str)
def test_two_ranks_have_the_gradient_of_one(name: str, parts: tuple[int, int]) -> None:
    network, images, objects = scene(name)
    criterion = network.config.build_criterion()  # type: ignore[union-attr, operator]
    whole = criterion.loss(network(images), objects, SIZE)
    whole["loss"].backward()
    expected = gradient(network)
    first = parts[0]
    split = [(images[:first], objects[:first]), (images[first:], objects[first:])]
    counts = [sums(network, *part)["divisor"].detach().double() for part in split]
    total, loss = torch.zeros_like(expected), 0.0
    for rank, part in enumerate(split):
        divisor = _Divisor(Ranks(counts[1 - rank]))
        values = sums(network, *part)
        count = divisor.add(values["divisor"])
        assert count is not None
        (values["loss"] / count).backward()
        total += gradient(network)
        loss += float(values["loss"].detach() / count)
    assert loss == pytest.approx(float(whole["loss"]), rel=1e-9)
    assert float((total - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("name", ["spike_yolo_tiny", "retinanet_tiny"])
def test_micro_batches_have_the_gradient_of_the_whole(name: str) -> None:
    network, images, objects = scene(name)
    whole = network.config.build_criterion().loss(network(images), objects, SIZE)  # type: ignore[union-attr, operator]
    whole["loss"].backward()
    expected = gradient(network)
    divisor = _Divisor(ProcessGroup.single())
    for row in range(IMAGES):
        values = sums(network, images[row : row + 1], objects[row : row + 1])
        count = divisor.add(values["divisor"])
        assert count is not None
        (values["loss"] / count).backward()
    divisor.total(IMAGES)
    divisor.correct(network.parameters())
    assert float((gradient(network) - expected).norm() / expected.norm()) < 1e-6


def test_divisors_of_each_rank_are_another_gradient() -> None:
    """What `train.loss_divisor=rank` keeps: the mean over ranks of their own losses, as released code has it."""
    network, images, objects = scene("retinanet_tiny")
    criterion = network.config.build_criterion()  # type: ignore[union-attr, operator]
    criterion.loss(network(images), objects, SIZE)["loss"].backward()
    whole = gradient(network)
    for part in (slice(0, 2), slice(2, 4)):
        (criterion.loss(network(images[part]), objects[part], SIZE)["loss"] / 2).backward()
    assert float((gradient(network) - whole).norm() / whole.norm()) > 0.1


def test_a_mean_over_samples_is_not_divided_again() -> None:
    divisor = _Divisor(ProcessGroup.single())
    assert divisor.add(None) is None
    assert divisor.total(7) == 7


@pytest.mark.parametrize(("workers", "divisor"), [(2, "rank"), (1, "global")])
def test_runs_that_lack_the_field_are_resumed_as_they_were_trained(workers: int, divisor: str) -> None:
    stored = load_config("scenes_spike_yolo", {"cluster.workers": workers}).dump()
    del stored["train"]["loss_divisor"]
    assert parse_config(with_current_keys(stored), "run").train.loss_divisor == divisor
