"""Stages that are computed again in the backward pass: less is kept, and nothing differs to the last bit."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config, differences
from spikefleet.errors import UserError
from spikefleet_models import recomputation
from spikefleet_models.carried_state import with_state
from spikefleet_models.families import build_model, list_models, model_config
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.kernels import CpuForm
from spikefleet_models.packed_spikes import packed_spikes
from spikefleet_models.recomputation import StagedNetwork, recompute_stages

T, B = 2, 2


def built(name: str) -> tuple[nn.Module, Tensor]:
    fields: dict[str, dict[str, Any]] = {
        "seven_b_net_narrow": {"timesteps": T, "channels": (8, 16)},
        "spike_yolo_tiny": {"timesteps": T},
        "sg_resnet_tiny": {"timesteps": T, "stages": (1, 1), "width": 0.125, "decoder": "rate"},
    }
    torch.manual_seed(0)
    model = build_model(model_config(name, **fields.get(name, {}))).train()
    if name.startswith("seven"):
        return model, torch.randn(T, B, 2, 12, 12)
    return model, torch.randn(B, 1, 9, 9) if name.startswith("sg") else torch.randn(1, 3, 64, 64)


def step(
    model: nn.Module, x: Tensor, stages: int, bf16: bool = False, packs: bool = False, monitored: bool = False
) -> list[Tensor | None]:
    """Loss, gradients, buffers and the next random number of a training step on a copy."""
    model = copy.deepcopy(model)
    recompute_stages(model, stages)
    torch.manual_seed(1)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        packed_spikes() if packs else nullcontext(),
        SpikeMonitor(model) if monitored else nullcontext(),
    ):
        outputs = model(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = torch.stack([(output.float() ** 2).mean() for output in outputs]).sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), *model.buffers(), torch.rand(1)]


def equal(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sg_resnet_tiny", "seven_b_net_narrow", "retinanet_tiny", "spike_yolo_tiny"])
def test_nothing_changes_but_what_is_kept(name: str, bf16: bool, cpu_form: CpuForm) -> None:
    model, x = built(name)
    plain = step(model, x, 0, bf16)
    stages = model.get_submodule("").stage_blocks()  # type: ignore[operator]
    for packs in (False, True):
        assert equal(step(model, x, len(stages), bf16, packs), plain)


@pytest.mark.parametrize("name", ["sg_resnet_tiny", "spike_yolo_tiny"])
def test_statistics_that_the_second_pass_updates_too_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the comparison above; SpikeYOLO's borders are computed from them, so gradients differ too."""
    model, x = built(name)
    plain = step(model, x, 0)
    monkeypatch.setattr(recomputation, "_contexts", lambda block: (nullcontext(), nullcontext()))
    again = step(model, x, 1)
    assert not equal(again, plain)
    gradients = slice(1, 1 + len(list(model.parameters())))
    assert equal(again[gradients], plain[gradients]) == (name == "sg_resnet_tiny")


def test_a_monitored_step_is_recomputed_in_the_form_that_is_observed() -> None:
    model, x = built("sg_resnet_tiny")
    assert equal(step(model, x, 2, monitored=True), step(model, x, 0, monitored=True))


def test_membranes_of_a_stream_are_not_moved_on_twice() -> None:
    found = []
    for stages in (0, 2):
        model, _ = built("seven_b_net_narrow")
        recompute_stages(model, stages)
        frames = torch.randn(2, T, B, 2, 12, 12, generator=torch.Generator().manual_seed(2))
        _, state = with_state(model, frames[0])
        logits, after = with_state(model, frames[1], state.detach())
        (logits**2).mean().backward()
        found.append([logits.detach(), *after.tensors().values(), *(p.grad for p in model.parameters())])
    assert equal(found[1], found[0])


class Dropping(nn.Module):
    """A network with a random block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())

    def stage_blocks(self) -> list[list[nn.Module]]:
        return [[self.block]]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


def test_random_numbers_are_drawn_once() -> None:
    model = Dropping()
    assert equal(step(model, torch.ones(4, 8), 1), step(model, torch.ones(4, 8), 0))


def test_less_is_kept_and_evaluation_and_state_dict_are_as_before() -> None:
    model, x = built("sg_resnet_tiny")
    names, kept = list(model.state_dict()), []
    evaluated = model.eval()(x)
    model.train()
    for stages in (0, 1, 2):
        recompute_stages(model, stages)
        held: dict[int, Tensor] = {}

        def keep(tensor: Tensor, held: dict[int, Tensor] = held) -> None:
            held[tensor.untyped_storage().data_ptr()] = tensor

        with packed_spikes(keep):
            output = model(x)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in held.values()))
        del output
    assert kept[0] > kept[1] > kept[2]
    model, _ = built("sg_resnet_tiny")
    recompute_stages(model, 2)
    assert list(model.state_dict()) == names
    assert torch.equal(model.eval()(x), evaluated)


def test_a_copy_recomputes_with_its_own_weights() -> None:
    model, x = built("sg_resnet_tiny")
    recompute_stages(model, 2)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    copied(x).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in copied.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_configuration_knows_the_stages_of_the_network() -> None:
    staged = []
    with torch.device("meta"):
        for name in ("sg_resnet10", "seven_b_net_narrow", "retinanet_tiny", "spike_yolo_tiny", "spiking_yolov8_m"):
            config = model_config(name)
            network = config.build()
            assert isinstance(network, StagedNetwork)
            assert len(network.stage_blocks()) == config.stage_count
            staged.append(config.family)
    others = {model_config(name).family for name in list_models()} - set(staged)
    assert others
    assert all(model_config(name).stage_count == 0 for name in list_models() if model_config(name).family in others)


def test_stages_that_are_not_there() -> None:
    model, _ = built("sg_resnet_tiny")
    with pytest.raises(ValueError, match="3 stages to recompute, but SGResNet has 2; give at most that many"):
        recompute_stages(model, 3)
    with pytest.raises(ValueError, match="1 stages to recompute, but Linear has 0"):
        recompute_stages(nn.Linear(1, 1), 1)
    recompute_stages(nn.Linear(1, 1), 0)


def config(*words: str, recipe: str = "digits") -> Config:
    return load_config(recipe, parse_overrides(words))


def refusal(*words: str, recipe: str = "digits") -> str:
    with pytest.raises(UserError) as refused:
        config(*words, recipe=recipe)
    return str(refused.value)


def test_what_the_configuration_refuses() -> None:
    there = config().model.stage_count
    assert config(f"train.recompute={there}").train.recompute == there
    assert f"has only {there} stages; set at most {there}" in refusal(f"train.recompute={there + 1}")
    assert "has no stages; set train.recompute=0" in refusal("train.recompute=1", recipe="saccades_small")
    gpus = ("cluster.gpu=true", "train.sync_bn=true")
    assert "cannot be combined with train.sync_bn=true" in refusal(*gpus, "train.recompute=1")
    assert config(*gpus).train.sync_bn
    assert "recompute=1 cannot be combined with compile=true" in refusal("train.recompute=1", "train.compile=true")
    assert "spike_bits=true cannot be combined with compile=true" in refusal(
        "train.spike_bits=true", "train.compile=true"
    )
    graphs = ("cluster.gpu=true", "cluster.workers=1", "train.cuda_graphs=true")
    assert "spike_bits=true cannot be combined with cuda_graphs=true" in refusal(*graphs, "train.spike_bits=true")


def test_a_run_resumes_with_other_values() -> None:
    """They change no bit of the result, and runs of earlier versions have neither."""
    plain, other = config(), config("train.recompute=1", "train.spike_bits=true")
    assert plain.digest() == other.digest()
    assert differences(plain.dump(), other.dump()) == []
    earlier = plain.dump()
    del earlier["train"]["recompute"], earlier["train"]["spike_bits"]
    assert differences(earlier, plain.dump()) == []
    assert differences(plain.dump(), config("train.clip_norm=1").dump()) != []
