"""Networks on event frames: pins, pooling, any number of steps, answers over time, gradients of 7B-Net."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from spikefleet_models import build_model, model_config
from spikefleet_models.decoders import AttentionSpikeDecoder, RateDecoder, StepWeights, decode_over_time
from spikefleet_models.gradient_flow import TRAINABLE, GradientFlow, first_to_last, judge
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.kernels import native_flaw
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.seven_b_net import pool_sides_over_one
from spikefleet_models.shortcut import ShortcutNetwork
from spikefleet_models.shortcut_config import ShortcutConfig
from spikefleet_models.spiking_unit import use_implementation

SEVEN: dict[str, Any] = {"channels": (8, 8, 16), "asd_channel_reduction": 4, "num_classes": 5}
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("seven_b_net_narrow", {**SEVEN, "decoder": "rate"}),
    ("small_event_net", {}),
    ("sg_resnet_tiny", {"decoder": "rate", "in_channels": 2}),
    ("sg_resnet_tiny", {"decoder": "rate", "in_channels": 2, "connection": "post_add", "neuron": {"kind": "lif"}}),
    ("spike_yolo_tiny", {"in_channels": 2, "neuron": {"kind": "ilif", "bound": 2}}),
    ("spike_yolo_s", {"in_channels": 2, "width": 0.0625, "depth": 0.1, "head": "anchor"}),
    ("spiking_yolov8_m", {"in_channels": 2, "width": 0.0625, "depth": 0.1}),
    ("retinanet_tiny", {"backbone": {"decoder": "rate", "in_channels": 2, "stem": "imagenet"}}),
]
ATTENTIVE: list[tuple[str, dict[str, Any]]] = [
    ("seven_b_net_narrow", SEVEN),
    ("sg_resnet_tiny", {"in_channels": 2}),
    ("small_event_net_weighted", {}),
    ("retinanet_tiny", {"backbone": {"in_channels": 2}}),
]


def events(steps: int, samples: int = 2, side: int = 17, channels: int = 2) -> Tensor:
    """Counts of events [T, B, C, H, W]."""
    generator = torch.Generator().manual_seed(steps)
    return torch.poisson(torch.full((steps, samples, channels, side, side), 0.7), generator)


def built(name: str, timesteps: int, fields: dict[str, Any]) -> nn.Module:
    nested = "backbone" in fields
    steps = {"backbone": {**fields["backbone"], "timesteps": timesteps}} if nested else {"timesteps": timesteps}
    torch.manual_seed(1)
    return build_model(model_config(name, **{**fields, **steps}))


def settled(network: nn.Module, frames: Tensor) -> nn.Module:
    """In eval mode, with running statistics of the frames, so that neurons fire."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(frames)
    return network.eval()


def parts(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("seven_b_net_wide", {"decoder": "rate"}, 1_192_218),
        ("sew_seven_b_net_wide", {}, 1_192_218),
        # ASD: shared MLP of r = 16, 7x7 convolution of two maps, two 16x16 matrices over T.
        ("seven_b_net_wide", {}, 1_192_218 + 2 * 128 * 8 + 98 + 2 * 16 * 16),
        ("seven_b_net_narrow", {"decoder": "rate"}, 130_393),
        ("seven_b_net_narrow", {"decoder": "rate", "connection": "bsg_star"}, 130_393 + 7 * 2 * 32),
        ("small_event_net", {}, 23_724),
        ("small_event_net_weighted", {}, 23_724 + 16),
    ],
)
def test_parameter_pins(name: str, fields: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        network = build_model(model_config(name, **fields))
    assert parameters(network) == expected


@pytest.mark.parametrize(
    ("side", "sides"),
    [
        ((34, 34), [17, 8, 4, 2, 1, 1, 1]),
        ((128, 128), [64, 32, 16, 8, 4, 2, 1]),
        ((48, 48), [24, 12, 6, 3, 1, 1, 1]),
    ],
)
def test_pools_while_the_side_is_over_one(side: tuple[int, int], sides: list[int]) -> None:
    network = build_model(model_config("seven_b_net_narrow", channels=(2,) * 7, decoder="rate")).eval()
    with torch.no_grad():
        outputs = network.forward_blocks(torch.ones(1, 1, 2, *side))
    assert [output.shape[-1] for output in outputs] == sides
    assert outputs[-1].shape[-2:] == (1, 1)


def test_each_side_is_pooled_by_itself_and_a_spike_stays_one() -> None:
    spikes = torch.zeros(2, 1, 1, 1, 4)
    spikes[1, 0, 0, 0, 3] = 1
    pooled = pool_sides_over_one(spikes)
    assert pooled.flatten(1).tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert pool_sides_over_one(pool_sides_over_one(pooled)).shape == (2, 1, 1, 1, 1)


@pytest.mark.parametrize("connection", ["bsg", "bsg_star", "and", "iand", "add", "post_add"])
def test_connections_of_seven_b_net(connection: str) -> None:
    network = built("seven_b_net_narrow", 3, {**SEVEN, "connection": connection})
    values = {value for output in network.forward_blocks(events(3)) for value in output.unique().tolist()}
    assert values <= ({0.0, 1.0, 2.0, 3.0} if connection == "add" else {0.0, 1.0})
    assert (2.0 in values) == (connection == "add")


def test_each_layer_learns_its_own_tau_from_two() -> None:
    network = built("seven_b_net_narrow", 4, SEVEN)
    nodes = spiking_nodes(network)
    assert len(nodes) == 3 * 2 + 2
    assert all(1 / node.w.sigmoid().item() == 2.0 for node in nodes.values())  # type: ignore[union-attr]
    F.cross_entropy(network(events(4, 4)), torch.arange(4)).backward()
    assert all(node.w.grad is not None and node.w.grad != 0 for node in nodes.values())  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "fields"), NETWORKS)
@pytest.mark.parametrize("steps", [1, 5])
def test_any_number_of_steps(name: str, fields: dict[str, Any], steps: int) -> None:
    side = 64 if "yolo" in name or "retina" in name else 16
    frames = events(steps, side=side)
    network, other = built(name, 4, fields), built(name, steps, fields)
    results = []
    for each in (network, other):  # in training, so that statistics of the batch count too
        outputs = parts(each(frames))
        sum(output.square().mean() for output in outputs).backward()
        results.append(([o.detach() for o in outputs], [p.grad for p in each.parameters()]))
    for found, expected in zip(*results, strict=True):
        assert len(found) == len(expected)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    still = frames[0]
    assert all(torch.equal(a, b) for a, b in zip(parts(network.eval()(still)), parts(network(still)), strict=True))


def test_the_number_of_steps_counts() -> None:
    frames = events(6)
    network = settled(built("small_event_net", 4, {}), frames)
    with torch.no_grad():
        assert not torch.allclose(network(frames), network(frames[:3]))


@pytest.mark.parametrize(("name", "fields"), ATTENTIVE)
def test_weights_over_time_need_their_number_of_steps(name: str, fields: dict[str, Any]) -> None:
    side = 64 if "retina" in name else 16
    network = built(name, 4, fields)
    parts(network(events(4, side=side)))
    with pytest.raises(ValueError, match=r"T=5, expected T=4 of timesteps=4.*set timesteps=5, or decoder=rate"):
        network(events(5, side=side))


@pytest.mark.parametrize(("name", "fields"), [("seven_b_net_narrow", SEVEN), ("small_event_net", {})])
def test_frames_that_do_not_fit(name: str, fields: dict[str, Any]) -> None:
    network = built(name, 4, fields)
    for frames, message in (
        (torch.zeros(0, 2, 2, 9, 9), "T=0, expected at least 1"),
        (events(4, channels=3), "expected C=2"),
        (events(4).int(), "type is torch.int32"),
        (events(4)[0, 0], "expected .B, C, H, W. or .T, B, C, H, W."),
    ):
        with pytest.raises(ValueError, match=message):
            network(frames)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_forms_of_the_unit_agree_at_another_t(implementation: str) -> None:
    if implementation == "native" and native_flaw() is not None:
        pytest.skip(f"the native form cannot be used: {native_flaw()}")
    expected, network = built("sg_resnet_tiny", 4, NETWORKS[2][1]), built("sg_resnet_tiny", 4, NETWORKS[2][1])
    use_implementation(expected, "lean")
    use_implementation(network, implementation)  # type: ignore[arg-type]
    assert torch.equal(network(events(7)), expected(events(7)))


@pytest.mark.parametrize(
    ("name", "fields"),
    [("seven_b_net_narrow", SEVEN), NETWORKS[0], ("small_event_net_weighted", {}), NETWORKS[1], NETWORKS[2]],
)
def test_the_answer_after_each_step(name: str, fields: dict[str, Any]) -> None:
    frames = events(5, side=16)
    network = settled(built(name, 5, fields), frames)
    other = frames.clone()
    other[3:] = 0
    with torch.no_grad():
        answers, changed = network.forward_over_time(frames), network.forward_over_time(other)
        assert torch.allclose(answers[-1], network(frames), atol=1e-6)  # a layer on T times as many rows sums otherwise
        assert torch.equal(answers[:3], changed[:3])
        assert not torch.equal(answers[3:], changed[3:])
        if fields.get("decoder") == "rate":
            assert torch.allclose(answers[2], network(frames[:3]), atol=1e-5)
        still = network.forward_over_time(frames[0])
        assert torch.allclose(still[-1], network(frames[0]), atol=1e-6)


@pytest.mark.parametrize("decoder", [RateDecoder(), StepWeights(4), AttentionSpikeDecoder(16, 4)])
def test_decoding_over_time(decoder: nn.Module) -> None:
    spikes = (torch.rand(4, 2, 16, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    decoded = decode_over_time(decoder, spikes)
    assert torch.equal(decoded[-1], decoder(spikes))
    if not isinstance(decoder, AttentionSpikeDecoder):
        assert torch.allclose(decoded[1], spikes[:2].mean(0))
    assert not torch.allclose(decoded[1], decoded[-1])


def test_step_weights_start_as_the_mean_and_can_tell_the_order() -> None:
    decoder, spikes = StepWeights(3), torch.rand(3, 1, 2, 1, 1)
    assert torch.allclose(decoder(spikes), spikes.mean(0))
    assert torch.allclose(decoder(spikes.flip(0)), decoder(spikes))
    nn.init.constant_(decoder.weight[1:], 0.0)
    assert not torch.allclose(decoder(spikes.flip(0)), decoder(spikes))


@pytest.mark.parametrize(("name", "fields"), [("seven_b_net_narrow", SEVEN), ("small_event_net_weighted", {})])
def test_the_ann_twin_averages_frames(name: str, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    twin = build_model(model_config(name, **fields).twin()).eval()
    frames = events(3, side=16)
    with torch.no_grad():
        mean = torch.stack([twin(frame) for frame in frames]).mean(0)
        assert torch.allclose(twin(frames), mean, atol=1e-5)
        assert not torch.allclose(twin(frames), twin(frames[:1]), atol=1e-5)
    assert not spiking_nodes(twin)


def test_larger_frames_are_averaged_to_the_grid() -> None:
    network = built("small_event_net", 2, {}).eval()
    assert network.forward_features(events(2, side=17)).shape[-2:] == (5, 5)
    assert network(events(2, side=34)).shape == (2, 10)


def test_stateless_neurons_do_not_see_order() -> None:
    stateless = built("small_event_net", 6, {"neuron": NeuronConfig(kind="ilif", bound=1, leak=0.0)})
    stateful = built("small_event_net", 6, {})
    frames = events(6)
    for network, sees in ((stateless, False), (stateful, True)):
        with torch.no_grad():
            difference = (network(frames.flip(0)) - network(frames)).abs().max()
        assert (difference > 1e-3) == sees


def test_gradients_reach_the_first_layer_of_the_published_network() -> None:
    torch.manual_seed(0)
    config = model_config("seven_b_net_wide", timesteps=4)
    network = build_model(config)
    # Few events: of many, max-pools and BSG make ones everywhere, which the last blocks' batch norms silence.
    frames = torch.poisson(torch.full((4, 8, 2, 34, 34), 0.02), torch.Generator().manual_seed(0))
    with GradientFlow(network) as flow, SpikeMonitor(network) as monitor:
        F.cross_entropy(network(frames), torch.arange(8)).backward()
    layers = flow.layers(0.1)
    assert len([row for row in layers if row.layer.startswith(config.trunk)]) == 16
    assert judge(layers, config.trunk) is None
    assert TRAINABLE[0] < first_to_last(layers, config.trunk) < TRAINABLE[1]
    assert all(0.005 < row["rate"] < 0.9 for row in monitor.table())


def test_side_branches_of_seven_b_net() -> None:
    network = built("seven_b_net_narrow", 4, SEVEN)
    for where, widths in (("stage", [8]), ("block", [8, 8])):
        wrapped = ShortcutNetwork(network, ShortcutConfig(where=where))
        assert [branch.in_features for branch in wrapped.branches] == widths
        main, sides = wrapped.train()(events(4))
        assert (main.shape, [side.shape for side in sides]) == ((2, 5), [(2, 5)] * len(widths))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": ()}, "channels"),
        ({"channels": (8, 0)}, "at least 1 channel"),
        ({"channels": (24,)}, "asd_channel_reduction=16 must divide"),
        ({"asd_temporal_reduction": 3}, "must divide timesteps=16"),
    ],
)
def test_bad_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model_config("seven_b_net_wide", **fields)


def test_integers_do_not_feed_the_decoder_of_the_small_network() -> None:
    with pytest.raises(ValidationError, match=r"neuron.bound=2: .* set neuron.bound=1"):
        model_config("small_event_net", neuron={"kind": "ilif", "bound": 2})
    assert model_config("small_event_net", neuron={"kind": "ilif", "bound": 1}).is_spiking
