"""Membrane state carried over windows: two windows are one long one, in every form of the unit and every network."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikefleet_models import equivalence, membrane, spike_driven
from spikefleet_models.carried_state import CarriedState, carried, restore_state, with_state
from spikefleet_models.equivalence import check_carried
from spikefleet_models.families import build_model, model_config
from spikefleet_models.kernels import CpuForm
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import ILIF, spiking_nodes
from spikefleet_models.reparam import deploy
from spikefleet_models.spiking_unit import SpikingUnit, use_implementation
from unit.test_spike_driven_models import randomise_norms
from unit.test_spiking_unit import FORMS, SIZE, B, C, T, inputs, unit

LANES = 2
SOFT_PLIF = NeuronConfig(kind="plif", v_reset=None, detach_reset=False)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sg if": ("sg_resnet_tiny", {"decoder": "rate"}),
    "sg lif at -0.1": ("sg_resnet_tiny", {"decoder": "rate", "neuron": NeuronConfig(kind="lif", v_reset=-0.1)}),
    "bsg* lif": ("sg_resnet_tiny", {"decoder": "rate", "connection": "bsg_star", "neuron": NeuronConfig(kind="lif")}),
    "post-add plif": ("sg_resnet_tiny", {"decoder": "rate", "connection": "post_add", "neuron": SOFT_PLIF}),
    "small event net": ("small_event_net", {}),
    "7b-net": ("seven_b_net_narrow", {"decoder": "rate"}),
    "spike yolo i-lif": ("spike_yolo_tiny", {"neuron": NeuronConfig(kind="ilif", bound=2, leak=0.5)}),
    "retinanet if": ("retinanet_tiny", {}),
}


def network_pair(name: str, steps: int, double: bool = False) -> tuple[nn.Module, nn.Module, int]:
    """The same weights with T = steps and with T = 2 * steps; and the channels of the input."""
    member, fields = NETWORKS[name]
    short, long = (_built(member, fields, timesteps) for timesteps in (steps, 2 * steps))
    long.load_state_dict(short.state_dict())
    config = model_config(member)
    channels = getattr(config, "in_channels", None) or config.backbone.in_channels  # type: ignore[attr-defined]
    return (short.double(), long.double(), channels) if double else (short, long, channels)


def _built(member: str, fields: dict[str, Any], timesteps: int) -> nn.Module:
    torch.manual_seed(0)
    time = {"timesteps": timesteps}
    overrides = {"backbone": time | {"decoder": "rate"}} if member == "retinanet_tiny" else time
    return randomise_norms(build_model(model_config(member, **overrides, **fields)))


def frames(steps: int, channels: int, double: bool = False) -> Tensor:
    drawn = torch.randn(steps, LANES, channels, 16, 16, generator=torch.Generator().manual_seed(3)) + 0.5
    return drawn.double() if double else drawn


def emitted(network: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """What each neuron layer emits over all windows, [T, B, ...]."""
    calls: dict[str, list[Tensor]] = {}
    handles = [
        node.register_forward_hook(lambda module, args, out, name=name: calls.setdefault(name, []).append(out))
        for name, node in spiking_nodes(network).items()
    ]
    run()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in calls.items()}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", list(NETWORKS))
@torch.no_grad()
def test_two_windows_are_one_long_one(name: str, steps: int) -> None:
    short, long, channels = network_pair(name, steps)
    x = frames(2 * steps, channels)
    last: dict[str, CarriedState] = {}

    def windows() -> None:
        _, state = with_state(short, x[:steps])
        _, last["short"] = with_state(short, x[steps:], state)

    def whole() -> None:
        _, last["long"] = with_state(long, x)

    def reset_between() -> None:
        for window in x.split(steps):
            short(window)

    ours, theirs = emitted(short, windows), emitted(long, whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)
    assert any(spikes.any() for spikes in theirs.values())
    assert all(torch.equal(v, last["long"].membranes[layer]) for layer, v in last["short"].membranes.items())
    without = emitted(short, reset_between)
    assert not all(torch.equal(without[layer], theirs[layer]) for layer in theirs)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith(("sg", "bsg", "post", "small"))])
@torch.no_grad()
def test_fused_windows_are_one_long_one(name: str, cpu_form: CpuForm) -> None:
    """Hooks keep the unit from its fused form; here there are none, and features and membranes are compared."""
    short, long, channels = network_pair(name, 2)
    x = frames(4, channels)
    first, state = _features(short, x[:2], None)
    second, state = _features(short, x[2:], state)
    expected, whole = _features(long, x, None)
    assert torch.equal(torch.cat((first, second)), expected)
    assert expected.mean() > 0
    assert all(torch.equal(v, whole.membranes[layer]) for layer, v in state.membranes.items())


def _features(network: Any, x: Tensor, state: CarriedState | None) -> tuple[Tensor, CarriedState]:
    with carried(network, state) as carrier:
        features = network.forward_features(x)
    return features if isinstance(features, Tensor) else features[-1], carrier.state


@pytest.mark.parametrize("name", ["sg lif at -0.1", "post-add plif", "spike yolo i-lif"])
def test_gradients_through_two_windows_are_those_of_one_long_one(name: str) -> None:
    short, long, channels = network_pair(name, 2, double=True)
    x = frames(4, channels, double=True)

    def gradients(network: nn.Module, windows: int, detach: bool = False) -> tuple[Tensor, list[Tensor]]:
        network.zero_grad()
        given = x.clone().requires_grad_()
        state = None
        for window in given.chunk(windows):
            before = state.detach() if state and detach else state
            _, state = with_state(network, window, before)
        assert state is not None
        # Of the membranes alone: the outputs average over windows of different lengths.
        sum(v.square().sum() for v in state.membranes.values()).backward()  # type: ignore[union-attr]
        named = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        assert given.grad is not None
        return given.grad, named

    (ours, our_weights), (theirs, their_weights) = gradients(short, 2), gradients(long, 1)
    assert theirs[:2].abs().max() > 0
    assert torch.equal(ours, theirs)
    for one, other in zip(our_weights, their_weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())
    cut, _ = gradients(short, 2, detach=True)
    assert not cut[:2].any()
    assert torch.equal(cut[2:], ours[2:])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("tile", [1 << 18, 300])
def test_lean_form_with_a_state_equals_the_reference(
    form: str, layout: torch.memory_format, tile: int, monkeypatch: pytest.MonkeyPatch, lean_form: None
) -> None:
    monkeypatch.setattr(membrane, "TILE_ELEMENTS", tile)
    lean = unit(**FORMS[form])
    reference = copy.deepcopy(lean)
    use_implementation(reference, "reference")
    ours, theirs = _run_from_state(lean, layout), _run_from_state(reference, layout)
    for name, expected in theirs.items():
        # One number for w: a sum of thousands of terms of both signs.
        scale = expected.abs().max().clamp_min(1.0 if name == "grad neuron.w" else 1e-3)
        assert (ours[name] - expected).abs().max() <= 3e-6 * scale, name
    assert torch.equal(ours["y"], theirs["y"])
    assert theirs["grad v"].any()


def _run_from_state(module: SpikingUnit, layout: torch.memory_format) -> dict[str, Tensor]:
    z, x, weights = inputs(layout)
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(B, C, SIZE, SIZE, generator=generator).contiguous(memory_format=layout).requires_grad_()
    to_last = torch.randn(B, C, SIZE, SIZE, generator=generator)
    z, shortcut = z.clone().requires_grad_(), None
    if module.gate is not None or module.post_add:
        shortcut = x.clone().requires_grad_()
    node: Any = module.neuron
    node.keep_state, node.v = True, v
    y = module(z, None if shortcut is None else shortcut.unflatten(0, (T, -1)))
    last = node.v
    ((y * weights.unflatten(0, (T, -1))).sum() + (last * to_last).sum()).backward()
    result = {"y": y.detach(), "v": last.detach(), "grad z": z.grad, "grad v": v.grad}
    if shortcut is not None:
        result["grad shortcut"] = shortcut.grad
    return result | {f"grad {name}": p.grad for name, p in module.named_parameters()}  # type: ignore[return-value]


def test_a_carried_state_saves_the_first_membrane_and_no_more(lean_form: None) -> None:
    z, _, _ = inputs()
    z.requires_grad_()
    kept: list[set[int]] = []
    for carry in (False, True):
        module, saved = unit(), set[int]()
        node: Any = module.neuron
        node.keep_state = carry
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.add(t.numel()) or t,  # type: ignore[misc]
            lambda t: t,
        ):
            module(z)
        kept.append(saved)
    assert kept[0] == {z.numel(), C}
    assert kept[1] - kept[0] == {z.numel() // T}


def test_a_last_membrane_alone_has_gradients(cpu_form: CpuForm) -> None:
    module = unit(gate="bsg")
    z, x, _ = inputs()
    z.requires_grad_()
    with carried(module) as carrier:
        module(z, x.unflatten(0, (T, -1)))
    (last,) = carrier.state.membranes.values()
    last.sum().backward()
    assert z.grad is not None
    assert z.grad.any()


def test_a_16_bit_unit_carries_an_fp32_membrane(cpu_form: CpuForm) -> None:
    module, wide = unit().eval(), unit().eval()
    z, _, _ = inputs()
    state = wide_state = None
    with torch.no_grad():
        for _ in range(2):
            y, state = with_state(module, z.bfloat16(), state)
            wide_y, wide_state = with_state(wide, z.bfloat16().float(), wide_state)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), wide_y)
    assert state is not None
    assert wide_state is not None
    assert torch.equal(state.membranes["neuron"], wide_state.membranes["neuron"])


@torch.no_grad()
def test_restarted_lanes_are_fresh_and_the_others_go_on() -> None:
    network, _, channels = network_pair("sg lif at -0.1", 2)
    x = frames(4, channels)
    fresh, _ = _features(network, x[2:], None)
    _, state = _features(network, x[:2], None)
    both, _ = _features(network, x[2:], state)
    mixed, _ = _features(network, x[2:], state.restart(torch.tensor([True, False])))
    assert torch.equal(mixed[:, 0], fresh[:, 0])
    assert torch.equal(mixed[:, 1], both[:, 1])
    assert not torch.equal(both[:, 0], fresh[:, 0])
    assert not torch.equal(both[:, 1], fresh[:, 1])


@torch.no_grad()
def test_a_network_is_left_as_it_was() -> None:
    network, _, channels = network_pair("spike yolo i-lif", 1)
    x = frames(1, channels)
    before = network(x)
    _, state = with_state(network, x)
    with_state(network, x, state)
    copy.deepcopy(network)
    assert all(torch.equal(one, other) for one, other in zip(network(x), before, strict=True))
    assert not any(node.keep_state for node in spiking_nodes(network).values())
    with pytest.raises(ValueError, match="sides are 16x15"):
        with_state(network, x[..., :-1])
    assert not any(node.keep_state for node in spiking_nodes(network).values())


@torch.no_grad()
def test_a_saved_state_is_restored() -> None:
    network, _, channels = network_pair("sg lif at -0.1", 2)
    x = frames(4, channels)
    _, state = with_state(network, x[:2])
    saved = state.tensors()
    restored = restore_state(network, saved)
    expected, _ = with_state(network, x[2:], state)
    found, _ = with_state(network, x[2:], restored)
    assert torch.equal(found, expected)
    lanes = torch.ones(LANES, dtype=torch.bool)
    for name, v in restored.restart(lanes).membranes.items():
        assert torch.equal(v, torch.full_like(v, -0.1)), name


@torch.no_grad()
def test_a_state_that_does_not_fit_is_refused() -> None:
    network, _, channels = network_pair("sg if", 2)
    _, state = with_state(network, frames(2, channels))
    saved = state.tensors()
    name = next(iter(saved))
    with pytest.raises(ValueError, match=f"the network has a layer '{name}' of neurons, the carried state has not"):
        restore_state(network, {other: v for other, v in saved.items() if other != name})
    with pytest.raises(ValueError, match="the carried state has a layer 'spare'"):
        restore_state(network, saved | {"spare": saved[name]})
    with pytest.raises(ValueError, match="different numbers of lanes"):
        restore_state(network, saved | {name: saved[name][:1]})
    with pytest.raises(ValueError, match="is not finite"):
        restore_state(network, saved | {name: torch.full_like(saved[name], float("nan"))})
    with pytest.raises(ValueError, match=r"has shape \[2, .*, but the window needs \[1, "):
        with_state(network, frames(2, channels)[:, :1], state)
    with pytest.raises(ValueError, match=r"expected torch.bool of shape \[2\]"):
        state.restart(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no spiking neurons"):
        with_state(nn.ReLU(), torch.zeros(1))


def test_integer_and_binary_form_carry_the_same_membrane(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _, channels = network_pair("spike yolo i-lif", 2)
    windows = list(frames(4, channels).split(2))
    deployed = deploy(network)
    assert check_carried(deployed, windows) is None
    genuine = spike_driven.spike_driven

    def leaky(*arguments: Any) -> nn.Module:
        binary = genuine(*arguments)
        for node in spiking_nodes(binary).values():
            assert isinstance(node, ILIF)
            node.leak /= 2
        return binary

    monkeypatch.setattr(equivalence, "spike_driven", leaky)
    problem = check_carried(deployed, windows)
    assert problem is not None
    assert problem.startswith("window 0: the membrane of ")
