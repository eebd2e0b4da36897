"""Side branches: values of the schedules, places, parameters, exactness at lambda = 0, losses, DDP, refusals."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spikefleet_models import build_model, model_config
from spikefleet_models.sg_resnet import SGResNet, SGResNetBackbone
from spikefleet_models.sg_resnet_config import SGResNetConfig
from spikefleet_models.shortcut import (
    ShortcutLogits,
    ShortcutNetwork,
    balance_coefficient,
    shortcut_loss,
)
from spikefleet_models.shortcut_config import ShortcutConfig

STAGE = ShortcutConfig(where="stage")


def tiny(**overrides: object) -> SGResNet:
    torch.manual_seed(0)
    return build_model(SGResNetConfig(**{"stages": (1, 2), "width": 0.25, "num_classes": 5, **overrides}))  # type: ignore[return-value]


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 3, 16, 16), torch.arange(6) % 5


def lambdas(iterations: tuple[int, ...], total: int = 8, **fields: object) -> list[float]:
    config = ShortcutConfig(**{"schedule": "linear", "lambda0": 0.25, **fields})  # type: ignore[arg-type]
    return [balance_coefficient(config, iteration, total) for iteration in iterations]


def test_schedules_at_start_middle_and_end() -> None:
    where = (0, 4, 8)
    assert lambdas(where, schedule="constant", lambda0=1.0) == [1.0, 1.0, 1.0]
    assert lambdas(where) == [0.25, 0.125, 0.0]
    assert lambdas((2, 6), lambda0=0.5) == [0.375, 0.125]
    assert lambdas(where, schedule="exp10") == [0.25, pytest.approx(0.25 * (10 - 10**0.5) / 9), 0.0]
    assert lambdas(where, schedule="cosine") == [0.25, pytest.approx(0.125), 0.0]
    assert lambdas(where, schedule="poly") == [0.25, pytest.approx(0.25 * 0.5**0.25), 0.0]
    assert lambdas(where, schedule="poly", power=2.0) == [0.25, 0.0625, 0.0]
    assert lambdas((0, 3, 4, 5, 6, 8), schedule="step", milestones=(0.5, 0.75), gamma=0.5) == [
        *(0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625)
    ]


@pytest.mark.parametrize("schedule", ["linear", "exp10", "cosine", "poly"])
def test_schedules_fall_all_the_time(schedule: str) -> None:
    values = lambdas(tuple(range(9)), schedule=schedule)
    assert all(before > after for before, after in itertools.pairwise(values))


@pytest.mark.parametrize(("iteration", "total"), [(-1, 8), (9, 8), (0, 0)])
def test_iterations_outside_training_are_refused(iteration: int, total: int) -> None:
    with pytest.raises(ValueError, match="is outside the training"):
        balance_coefficient(ShortcutConfig(), iteration, total)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "exponential"}, "schedule"),
        ({"lambda0": -0.1}, "lambda0"),
        ({"lambda0": float("nan")}, "lambda0"),
        ({"power": 2.0, "schedule": "linear"}, "power=2.0 has no effect with schedule=linear"),
        ({"milestones": (0.5,)}, "has no effect with schedule=constant"),
        ({"gamma": 0.5, "schedule": "poly"}, "gamma=0.5 has no effect with schedule=poly"),
        ({"schedule": "step"}, "needs milestones"),
        ({"schedule": "step", "milestones": (0.75, 0.5)}, "increasing fractions"),
        ({"schedule": "step", "milestones": (0.5, 1.0)}, "between 0 and 1"),
        ({"lamda0": 0.25}, "lamda0"),
        ({"loss": "own_and_summed", "combine": "convex"}, "loss=own_and_summed is defined for combine=add only"),
    ],
)
def test_bad_configurations_name_the_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ShortcutConfig(**fields)


@pytest.mark.parametrize("name", ["sg_resnet18", "sew_resnet34", "spiking_resnet34", "resnet18"])
@pytest.mark.parametrize(("classes", "extra"), [(10, 4_510), (100, 45_100), (1000, 451_000)])
def test_branch_parameters_at_stage_level(name: str, classes: int, extra: int) -> None:
    # (64 + 128 + 256) * K + 3 * K
    with torch.device("meta"):
        network = build_model(model_config(name, num_classes=classes))
        wrapped = ShortcutNetwork(network, STAGE)
    plain = sum(p.numel() for p in network.parameters())
    assert sum(p.numel() for p in wrapped.parameters()) - plain == extra
    assert sum(p.numel() for p in wrapped.branches.parameters()) == extra


def test_branches_at_block_level() -> None:
    with torch.device("meta"):
        wrapped = ShortcutNetwork(build_model(model_config("sg_resnet18")), ShortcutConfig(where="block"))
    assert [branch.in_features for branch in wrapped.branches] == [64, 64, 128, 128, 256, 256, 512]


def test_the_plain_network_is_inside_unchanged() -> None:
    plain = tiny()
    expected = copy.deepcopy(plain.state_dict())
    wrapped = ShortcutNetwork(tiny(), STAGE)
    inside = wrapped.network.state_dict()
    assert inside.keys() == expected.keys()
    assert all(torch.equal(inside[name], tensor) for name, tensor in expected.items())
    images, _ = batch()
    assert torch.equal(wrapped.eval()(images), plain.eval()(images))
    assert isinstance(wrapped.train()(images), ShortcutLogits)


FAMILIES = ["bsg", "bsg_star", "add", "and", "iand", "post_add", "ann"]


@pytest.mark.parametrize("where", ["stage", "block"])
@pytest.mark.parametrize("connection", FAMILIES)
def test_branches_read_the_mean_over_time_and_place(connection: str, where: str) -> None:
    plain = tiny(connection=connection)
    wrapped = ShortcutNetwork(tiny(connection=connection), ShortcutConfig(where=where))
    images, _ = batch()
    logits = wrapped(images)
    assert torch.equal(logits.main, plain(images))
    seen: list[Tensor] = []
    for stage in plain.stages:
        for block in stage if where == "block" else [stage]:
            block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    plain(images)
    assert len(logits.sides) == len(seen) - 1 == {"stage": 1, "block": 2}[where]
    for side, branch, output in zip(logits.sides, wrapped.branches, seen, strict=False):
        torch.testing.assert_close(side, branch(output.mean(0).mean((2, 3))))


class Outside(nn.Module):
    """Three stages of one weight each, by nobody's family but with a configuration that knows its branches."""

    config = SGResNetConfig(stages=(1, 1, 1), width=1 / 16, num_classes=5)

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.tensor(float(scale)) for scale in (2, 3, 5))
        self.classifier = nn.Linear(16, 5)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        channels = self.config.stage_channels
        return [
            scale * images.mean() * torch.ones(2, 6, out, 1, 1)
            for scale, out in zip(self.scales, channels, strict=True)
        ]

    forward_blocks = forward_features

    def forward_head(self, features: Tensor) -> Tensor:
        return self.classifier(features.mean((0, 3, 4)))


def test_branches_attach_to_a_network_from_outside() -> None:
    torch.manual_seed(0)
    wrapped = ShortcutNetwork(Outside(), STAGE)
    logits = wrapped(torch.ones(6, 3, 4, 4))
    for side, branch, scale, channels in zip(logits.sides, wrapped.branches, (2.0, 3.0), (4, 8), strict=True):
        torch.testing.assert_close(side, branch(torch.full((6, channels), scale)))
    torch.testing.assert_close(logits.main, wrapped.network.classifier(torch.full((6, 16), 5.0)))


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("loss", "combine"),
    [
        ("summed_logits", "add"),
        ("summed_logits", "convex"),
        ("sum_losses", "add"),
        ("sum_losses", "convex"),
        ("own_and_summed", "add"),
        ("own_and_summed_detached", "add"),
    ],
)
@pytest.mark.parametrize("connection", ["bsg", "post_add", "ann"])
@pytest.mark.parametrize("coefficient", [0.0, 0.25])
def test_lambda_zero_is_the_plain_network(connection: str, combine: str, loss: str, coefficient: float) -> None:
    config = ShortcutConfig(where="stage", combine=combine, loss=loss)
    images, targets = batch()
    plain = tiny(connection=connection).double()
    expected = F.cross_entropy(plain(images.double()), targets, label_smoothing=0.1)
    expected.backward()
    wrapped = ShortcutNetwork(tiny(connection=connection), config).double()
    found = shortcut_loss(wrapped(images.double()), targets, coefficient, config, label_smoothing=0.1)
    found.backward()
    ours, theirs = gradients(wrapped.network), gradients(plain)
    assert ours.keys() == theirs.keys() == dict(plain.named_parameters()).keys()
    same = torch.equal(found, expected) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert same == (coefficient == 0.0)
    branches = gradients(wrapped.branches)
    assert branches.keys() == dict(wrapped.branches.named_parameters()).keys()
    assert all(bool(gradient.any()) != (coefficient == 0.0) for gradient in branches.values())


def test_losses_by_hand() -> None:
    torch.manual_seed(0)
    main, first, second = torch.randn(3, 4, 5).unbind()
    targets = torch.arange(4)
    logits = ShortcutLogits(main, (first, second))

    def loss(combine: str, kind: str) -> Tensor:
        return shortcut_loss(logits, targets, 0.25, ShortcutConfig(combine=combine, loss=kind))

    entropy = F.cross_entropy
    torch.testing.assert_close(loss("add", "summed_logits"), entropy(main + 0.25 * (first + second), targets))
    torch.testing.assert_close(loss("convex", "summed_logits"), entropy((2 * main + first + second) / 4, targets))
    sides = 0.25 * (entropy(first, targets) + entropy(second, targets))
    torch.testing.assert_close(loss("add", "sum_losses"), entropy(main, targets) + sides)
    torch.testing.assert_close(loss("convex", "sum_losses"), 0.5 * entropy(main, targets) + sides)
    together = entropy(main, targets) + 0.25 * entropy(main + first + second, targets)
    torch.testing.assert_close(loss("add", "own_and_summed"), together)
    torch.testing.assert_close(loss("add", "own_and_summed_detached"), together)


def test_detached_logits_are_trained_by_their_own_loss_alone() -> None:
    main = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    side = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(4)

    def gradient(kind: str) -> tuple[Tensor, Tensor]:
        loss = shortcut_loss(ShortcutLogits(main, (side,)), targets, 0.25, ShortcutConfig(loss=kind))
        own, other = torch.autograd.grad(loss, (main, side))
        return own, other

    (alone,) = torch.autograd.grad(F.cross_entropy(main, targets), (main,))
    detached, through = gradient("own_and_summed_detached"), gradient("own_and_summed")
    assert torch.equal(detached[0], alone)
    assert not torch.allclose(through[0], alone)
    torch.testing.assert_close(detached[1], through[1])


def test_a_branch_reaches_the_first_layer_past_silent_stages() -> None:
    images, targets = batch()
    norms = {}
    for coefficient in (0.0, 0.25):
        wrapped = ShortcutNetwork(tiny(connection="post_add"), STAGE)
        for module in wrapped.network.stages[1].modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, -1e3)  # far below threshold, where the surrogate gradient vanishes
        shortcut_loss(wrapped(images), targets, coefficient, STAGE).backward()
        norms[coefficient] = wrapped.network.stem.conv.weight.grad.norm()
    assert norms[0.25] > 1e3 * norms[0.0]


@pytest.mark.parametrize("coefficient", [0.0, 0.25])
def test_all_parameters_take_part_under_ddp(coefficient: float, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        images, targets = batch()
        replica = DistributedDataParallel(ShortcutNetwork(tiny(), STAGE))
        for _ in range(2):  # the second pass refuses when the first left a parameter out
            shortcut_loss(replica(images), targets, coefficient, STAGE).backward()
        F.cross_entropy(replica(images).main, targets).backward()
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            replica(images)
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_combines_in_fp32() -> None:
    images, targets = batch()
    wrapped = ShortcutNetwork(tiny(), STAGE)
    with torch.autocast("cpu", torch.bfloat16):
        logits = wrapped(images)
        assert logits.main.dtype == torch.bfloat16
        loss = shortcut_loss(logits, targets, 0.25, STAGE)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(wrapped).values())


def test_places_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="enables no side branches"):
        ShortcutNetwork(tiny(), ShortcutConfig())
    with pytest.raises(ValueError, match="only one stage"):
        ShortcutNetwork(tiny(stages=(2,)), STAGE)
    with pytest.raises(ValueError, match="SGResNet; Linear is not one"):
        ShortcutNetwork(nn.Linear(2, 2), STAGE)
    with pytest.raises(ValueError, match="SGResNet; SGResNetBackbone is not one"):
        ShortcutNetwork(SGResNetBackbone(SGResNetConfig()), STAGE)  # stages, and nothing that classifies them
    with torch.device("meta"), pytest.raises(ValueError, match="SGResNet; SpikeYolo is not one"):
        ShortcutNetwork(build_model(model_config("spike_yolo_tiny")), STAGE)
    too_heavy = ShortcutConfig(where="block", combine="convex", lambda0=0.3)
    with pytest.raises(ValueError, match=r"set at most 0\.25"):
        ShortcutNetwork(tiny(stages=(2, 3)), too_heavy)
