"""A training step on a GPU never waits: the same losses, weights and error sentences, read one step later."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training.optimizer import build_ema
from spikefleet.training.state import TrainingState
from spikefleet.training.step import Meter, settle, training_step
from spikefleet.training.step_reading import DeviceNumbers, NonFiniteError
from spikefleet_models.detection import Objects
from spikefleet_models.spike_yolo.loss import _complete_iou_loss, dense_complete_iou_loss
from spikefleet_pipelines.loading import Batch
from support.events import KeptEvents
from support.training_steps import CLASSIFIER, DETECTOR, RETINANET, random_batches, task_of, training_state
from support.waiting import WaitingError, no_waiting, waiting_allowed


@pytest.fixture(autouse=True)
def reading_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU these numbers are in main memory when they are read."""
    read = DeviceNumbers.read

    def from_main_memory(self: DeviceNumbers) -> list[float]:
        with waiting_allowed():
            return read(self)

    monkeypatch.setattr(DeviceNumbers, "read", from_main_memory)


def state_of(*words: str, late: bool) -> TrainingState:
    state = training_state(words, torch.device("cpu"))
    state.reads_late = late
    return state


def run(words: list[str], late: bool, poisoned: int | None = None, extra: tuple[str, ...] = ()) -> Any:
    """Trains a few steps; late ones in a mode that raises where the host would wait."""
    state, events = state_of(*words, *extra, late=late), KeptEvents()
    task, meter, error = task_of(state), Meter(), None
    healthy = task.loss
    seen = 0

    def loss(network: nn.Module, batch: Batch, balance: float) -> dict[str, Tensor]:
        nonlocal seen
        seen += 1
        values: dict[str, Tensor] = healthy(network, batch, balance)
        if seen == poisoned:
            values["loss"] = values["loss"] * float("nan")
        return values

    task.loss = loss
    try:
        for batch in random_batches(words):
            if not late:
                training_step(state, task, batch, meter, events)
                continue
            with no_waiting():
                training_step(state, task, batch, meter, events)
        settle(state, events)
    except NonFiniteError as raised:
        error = str(raised)
    return state, events, error


def weights(state: TrainingState) -> list[Tensor]:
    return [p.detach() for p in state.network.parameters()]


@pytest.mark.parametrize("words", [CLASSIFIER, DETECTOR, RETINANET], ids=["classification", "detection", "retinanet"])
def test_no_step_waits_and_nothing_else_changes(words: list[str]) -> None:
    (late, told, _), (now, expected, _) = run(words, late=True), run(words, late=False)
    for one, other in zip(weights(late), weights(now), strict=True):
        assert torch.equal(one, other)
    assert late.ema is not None
    assert now.ema is not None
    for one, other in zip(late.ema.module.parameters(), now.ema.module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert late.sums == now.sums
    rows, wanted = told.steps, expected.steps
    assert [row.step for row in rows] == [row.step for row in wanted] == [1, 2, 3, 4]
    for row, other in zip(rows, wanted, strict=True):
        assert {**row.metrics, "images_per_second": 0} == {**other.metrics, "images_per_second": 0}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_leaves_the_weights_and_says_the_same(precision: str) -> None:
    extra = (f"train.precision={precision}",)
    late, _, error = run(CLASSIFIER, late=True, poisoned=3, extra=extra)
    now, _, expected = run(CLASSIFIER, late=False, poisoned=3, extra=extra)
    assert error == expected
    assert str(error).startswith("the loss is nan at step 3 (epoch 1), on rank 0;")
    for one, other in zip(weights(late), weights(now), strict=True):
        assert torch.equal(one, other)
    healthy, _, _ = run(CLASSIFIER, late=True, extra=extra)
    assert any(not torch.equal(one, other) for one, other in zip(weights(healthy), weights(now), strict=True))


def test_a_gradient_that_is_not_finite_is_named_one_step_later() -> None:
    state, events = state_of(*CLASSIFIER, late=True), KeptEvents()
    task, meter = task_of(state), Meter()
    before = copy.deepcopy(weights(state))
    bias = state.network.classifier.bias
    bias.register_hook(lambda grad: grad * float("inf"))
    steps = random_batches(CLASSIFIER)
    training_step(state, task, next(steps), meter, events)
    for one, other in zip(weights(state), before, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(NonFiniteError, match=r"gradient is not finite at step 1 \(epoch 1\): classifier.bias;"):
        training_step(state, task, next(steps), meter, events)
    for one, other in zip(weights(state), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: float(x.sum()),
        lambda x: bool(x.sum() > 0),
        lambda x: 1 if x.sum() > 0 else 0,
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_whatever_waits_is_found(reads: Any) -> None:
    x = torch.rand(4)
    reads(x)
    with no_waiting(), pytest.raises(WaitingError):
        reads(x)
    with no_waiting():
        x.mul(2).topk(2)
        with waiting_allowed():
            reads(x)


def test_a_loss_that_reads_a_value_is_found() -> None:
    state = state_of(*CLASSIFIER, late=True)
    (batch, *_) = random_batches(CLASSIFIER)
    task: Any = _Reading(task_of(state))
    with no_waiting(), pytest.raises(WaitingError):
        training_step(state, task, batch, Meter(), KeptEvents())


class _Reading:
    """A task whose loss reads a value."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def loss(self, *given: Any) -> Any:
        values = self._task.loss(*given)
        assert values["loss"].item() >= 0
        return values


def test_the_dense_loss_of_boxes_is_torchvisions() -> None:
    torch.manual_seed(0)
    corners = torch.rand(2, 50, 2, dtype=torch.float64) * 40
    one, other = (torch.cat((c, c + 1 + torch.rand(50, 2, dtype=torch.float64) * 30), 1) for c in corners)
    one.requires_grad_()
    found, expected = dense_complete_iou_loss(one, other), _complete_iou_loss(one, other)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), one, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), one)
    assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("words", [DETECTOR, RETINANET], ids=["detection", "retinanet"])
def test_the_dense_criterion_is_the_sparse_one(words: list[str]) -> None:
    torch.manual_seed(0)
    config = load_config(words[0], parse_overrides(words[1:])).model
    sparse = config.build_criterion()
    dense: Any = config.build_criterion()
    dense.dense = True
    network = config.build().double()
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 10.0, 60.0, 30.0], [5.0, 5.0, 7.0, 6.0]]).double()
    objects = [Objects(boxes, torch.tensor([0, 2, 1])), Objects(boxes[:0], torch.tensor([], dtype=torch.int64))]
    outputs = tuple(one.detach().requires_grad_() for one in network(torch.rand(2, 3, 64, 64).double()))
    found, expected = (criterion.loss(outputs, objects, (64, 64)) for criterion in (dense, sparse))
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-10), name
    gradients, wanted = (torch.autograd.grad(values["loss"], outputs) for values in (found, expected))
    for one, other in zip(gradients, wanted, strict=True):
        assert one.isfinite().all()
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-12)
        assert one.abs().max() > 0


def test_the_average_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    ours = build_ema(network, 0.9)
    torchs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        network(torch.rand(2, 1, 5, 5)).sum().backward()
        with torch.no_grad():
            network[0].get_parameter("weight").add_(0.1)
            ours.update_parameters(network)
            torchs.update_parameters(network)
    for (name, one), other in zip(ours.module.state_dict().items(), torchs.module.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert ours.count == 3
