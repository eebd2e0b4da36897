"""Learning rates as pure functions of the position, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from spikefleet.config.optim_config import OptimConfig
from spikefleet.training.optimizer import build_ema, build_optimizer, learning_rate, momentum, set_rates
from spikefleet_models import build_model, model_config


def test_step_schedule_changes_at_whole_epochs() -> None:
    config = OptimConfig(lr=0.1, schedule="step", milestones=(2, 3), gamma=0.2)
    rates = [learning_rate(config, step, steps_per_epoch=5, epochs=4) for step in range(20)]
    assert rates == pytest.approx([0.1] * 10 + [0.02] * 5 + [0.004] * 5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_falling_schedules_meet_their_ends(schedule: str) -> None:
    config = OptimConfig.model_validate({"lr": 0.1, "schedule": schedule, "warmup_epochs": 1, "final_factor": 0.1})
    rates = [learning_rate(config, step, steps_per_epoch=10, epochs=11) for step in range(110)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[9] == rates[10] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.055)
    assert rates[-1] == pytest.approx(0.01, rel=0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("epochs", [0.01, 0.25, 0.5, 1.3])
def test_warm_up_never_overshoots(epochs: float) -> None:
    config = OptimConfig(lr=0.1, schedule="constant", warmup_epochs=epochs)
    rates = [learning_rate(config, step, steps_per_epoch=21, epochs=3) for step in range(63)]
    assert max(rates) == 0.1
    assert rates == sorted(rates)


def test_cosine_agrees_with_torch() -> None:
    config = OptimConfig(lr=0.1, schedule="cosine")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    for step in range(30):
        assert learning_rate(config, step, steps_per_epoch=1, epochs=30) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_norm_and_bias_can_be_kept_from_decay() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    config = OptimConfig(lr=0.1, weight_decay=0.5, decay_norm_and_bias=False)
    groups = build_optimizer(network, config).param_groups
    found = [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups]
    assert found == [("weights", 1, 0.5), ("scales", 1, 0.0), ("biases", 2, 0.0)]
    every = build_optimizer(network, OptimConfig(lr=0.1, weight_decay=0.5)).param_groups
    assert {group["weight_decay"] for group in every} == {0.5}


@pytest.mark.parametrize("norms", [True, False])
def test_learned_gates_do_not_decay_unless_asked(norms: bool) -> None:
    """Decay alone closes the gates: W falls below the threshold."""
    network = build_model(model_config("sg_resnet_tiny", connection="bsg_star"))
    gates = {name for name, _ in network.named_parameters() if ".gate." in name}
    assert len(gates) == 2 * 3
    names = {parameter: name for name, parameter in network.named_parameters()}

    def decays(**fields: bool) -> dict[str, float]:
        config = OptimConfig.model_validate({"lr": 0.1, "weight_decay": 0.5, "decay_norm_and_bias": norms, **fields})
        groups = build_optimizer(network, config).param_groups
        assert {group["name"] for group in groups} == {"weights", "scales", "biases"}
        for group in groups:
            assert all((group["name"] == "biases") == names[p].endswith("bias") for p in group["params"])
        return {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}

    spared, asked = decays(), decays(decay_gates=True)
    assert spared.keys() == asked.keys() == set(names.values())
    assert {spared[name] for name in gates} == {0.0}
    assert {asked[name] for name in gates} == {0.5}
    for name in spared.keys() - gates:
        one_dimension = network.get_parameter(name).ndim == 1
        assert spared[name] == asked[name] == (0.5 if norms or not one_dimension else 0.0)


def test_frozen_parameters_are_left_out() -> None:
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    (weights,) = build_optimizer(network, OptimConfig(lr=0.1)).param_groups
    assert len(weights["params"]) == 1


def test_biases_and_momentum_warm_up_on_their_own() -> None:
    config = OptimConfig(lr=0.01, warmup_epochs=2, warmup_bias_lr=0.1, warmup_momentum=0.8, momentum=0.9)
    biases = [learning_rate(config, step, steps_per_epoch=5, epochs=20, biases=True) for step in range(11)]
    assert biases[0] == pytest.approx(0.1 - 0.09 / 10)
    assert biases[9:] == pytest.approx([0.01, 0.01])
    assert biases[:10] == sorted(biases[:10], reverse=True)
    momenta = [momentum(config, step, steps_per_epoch=5) for step in range(11)]
    assert momenta[0] == pytest.approx(0.81)
    assert momenta[9:] == pytest.approx([0.9, 0.9])
    assert learning_rate(config, 0, steps_per_epoch=5, epochs=20) == pytest.approx(0.001)


def test_average_forgets_the_first_steps_soon_when_it_ramps() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = build_ema(network, decay=0.9, ramp=2.0)
    expected = float(network.weight.detach())
    for step in range(4):
        with torch.no_grad():
            network.weight.fill_(float(step))
        average.update_parameters(network)
        decay = 0.9 * (1 - math.exp(-(step + 1) / 2)) if step else 0.0  # the first update copies
        expected = decay * expected + (1 - decay) * step
    assert average.module.weight.item() == pytest.approx(expected)


def test_average_follows_weights_and_statistics() -> None:
    network = nn.BatchNorm1d(1)
    average = build_ema(network, decay=0.75)
    average.update_parameters(network)
    with torch.no_grad():
        network.weight.fill_(5.0)
        network.running_mean.fill_(8.0)  # type: ignore[union-attr]
    average.update_parameters(network)
    assert average.module.weight.item() == pytest.approx(0.75 * 1 + 0.25 * 5)
    assert average.module.running_mean.item() == pytest.approx(0.25 * 8)


def test_adamw_takes_the_schedules_of_rate_and_momentum() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    config = OptimConfig(
        kind="adamw", lr=0.01, beta2=0.99, weight_decay=0.5, decay_norm_and_bias=False, warmup_epochs=1,
        warmup_momentum=0.5,
    )  # fmt: skip
    optimizer = build_optimizer(network, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    set_rates(optimizer, config, step=0, steps_per_epoch=10, epochs=5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001] * 3)
    assert [group["betas"] for group in optimizer.param_groups] == [pytest.approx((0.54, 0.99))] * 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0, 0.0]
    before = network[0].weight.detach().clone()
    network(torch.randn(4, 1, 5, 5)).square().sum().backward()
    optimizer.step()
    moved = (network[0].weight.detach() - before * (1 - 0.001 * 0.5)).abs()
    assert torch.allclose(moved, torch.full_like(moved, 0.001), rtol=1e-3), "the first step moves weights by the rate"


@pytest.mark.parametrize("fields", [{"kind": "adamw", "nesterov": True}, {"beta2": 0.99}])
def test_fields_of_the_other_optimizer_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="has no effect with kind="):
        OptimConfig.model_validate({"lr": 0.1} | fields)
    OptimConfig.model_validate({"lr": 0.1, "kind": "adamw", "beta2": 0.99})
    OptimConfig.model_validate({"lr": 0.1, "nesterov": True})


@pytest.mark.parametrize("fields", [{"momentum": 0.9, "nesterov": True}, {"momentum": 0.9}, {"kind": "adamw"}])
def test_a_fused_optimizer_takes_the_same_steps(fields: dict[str, object]) -> None:
    """But for roundings of fp32; one that was not fused at all would be equal to the bit."""
    networks = []
    for fused in (False, True):
        torch.manual_seed(0)
        network = build_model(model_config("sg_resnet_tiny"))
        config = OptimConfig.model_validate({"lr": 0.1, "weight_decay": 0.01, "fused": fused, **fields})
        optimizer = build_optimizer(network, config)
        assert optimizer.defaults["fused"] is (True if fused else None)
        for _ in range(5):
            for parameter in network.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        networks.append(network.state_dict())
    plain, fused_one = networks
    for name, tensor in plain.items():
        torch.testing.assert_close(fused_one[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
