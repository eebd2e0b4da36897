"""Values that no run can have are refused by field, or by an estimate of memory, before anything is built."""

from __future__ import annotations

import resource
import time

import pytest
import torch

from spikefleet.config.recipes import list_recipes, load_config, parse_overrides
from spikefleet.errors import UserError
from spikefleet.search.search_files import parse_search
from spikefleet.training.memory import check_memory, estimate_memory


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed=10000000000000000000000", "train.seed=10000000000000000000000"),
        ("data.seed=10000000000000000000000", "data.seed=10000000000000000000000"),
        ("model.width=1e30", "model.width"),
        ("model.timesteps=9999999999", "model.timesteps=9999999999 is too large; at most 100,000"),
        ("model.stages=[1,1,1000000000]", "model.stages=1000000000 is too large; at most 256"),
        (f"model.stages=[{','.join(['1'] * 100)}]", "model.stages has 100 elements; at most 64"),
        ("model.in_channels=99999999999999", "model.in_channels=99999999999999 is too large"),
        ("train.epochs=1000000000000", "train.epochs=1000000000000: must be less than or equal to"),
        ("train.global_batch=1000000000000", "train.global_batch=1000000000000"),
        ("cluster.workers=1000000000", "cluster.workers=1000000000"),
        ("cluster.cpus_per_worker=1e30", "cluster.cpus_per_worker=1e"),
        ("checkpoint.keep_last=10000000000000000000000", "checkpoint.keep_last=10000000000000000000000 is too large"),
        ("optim.weight_decay=1e30", "optim.weight_decay=1e"),
        ("data.root=/a\x00b", "data.root='/a.x00b' has the control character"),
        ("tracking.experiment=a\x1b[31mb", "tracking.experiment=.* has the control character"),
        ("tracking.experiment=a\nb", "tracking.experiment=.* has the control character"),
        ("data.root=/caf\udce9", "data.root='/caf.udce9' has a byte that is not UTF-8"),
        ("tracking.experiment=" + "a" * 20_000, "tracking.experiment has 20,000 characters"),
    ],
)
def test_an_absurd_value_is_refused_by_its_field_at_once(override: str, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=said):
        load_config("digits", parse_overrides([override]))
    assert time.monotonic() - start < 1


def test_ordinary_values_and_all_recipes_are_within_the_limits() -> None:
    for name in list_recipes():
        load_config(name)
    for value in ("/données/猫/[a] $b %p", "/שלום", "/👩‍🔬"):
        assert str(load_config("digits", parse_overrides([f"data.root={value}"])).data.root) == value


@pytest.mark.parametrize("line", ["seed: 10000000000000000000000", "budget: {trials: 10000000000000000000000}"])
def test_a_search_is_checked_too(line: str) -> None:
    text = "recipe: digits\nobjectives: {val/top1: max}\nspace: {optim.lr: {uniform: [0.1, 0.2]}}\n"
    budget = "" if line.startswith("budget") else "budget: {trials: 3}\n"
    assert parse_search(text + "budget: {trials: 3}\n").budget.trials == 3
    with pytest.raises(UserError, match="less than"):
        parse_search(f"{text}{budget}{line}\n")


@pytest.mark.parametrize("override", ["model.width=1000", "model.timesteps=100000"])
def test_what_does_not_fit_into_memory_is_refused_with_the_estimate_before_anything_is_allocated(override: str) -> None:
    settings = ["model.stages=[1,1,1]", "train.global_batch=1000000", "cluster.workers=0", override]
    config = load_config("digits", parse_overrides(settings))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        UserError, match=r"takes at least [\d.,]+ [TP]B of memory .*this machine has [\d.,]+ [TG]B; set"
    ):
        check_memory(config, (1, 512, 512), local=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_the_estimate_is_what_a_network_has() -> None:
    config = load_config("digits", parse_overrides(["cluster.workers=0", "train.ema_decay=0.9"]))
    network = config.model.build()
    bits = torch.get_rng_state()
    estimate = estimate_memory(config, 8)
    assert torch.equal(torch.get_rng_state(), bits)  # the estimate draws nothing
    assert estimate.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert estimate.state_bytes == 4 * 4 * estimate.parameters
    assert estimate.input_bytes == 4 * config.model.timesteps * config.train.global_batch * 64
    check_memory(config, (1, 8, 8), local=True)


def test_every_recipe_fits_somewhere() -> None:
    for name in list_recipes():
        check_memory(load_config(name), None, local=False)
