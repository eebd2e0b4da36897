"""The residual networks: parameter pins, outputs of every connection, identity, refusals."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from spikefleet_models import build_model, model_config
from spikefleet_models.residual_block import ResidualBlock
from spikefleet_models.sg_resnet_config import SGResNetConfig


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("sg_resnet18", {"num_classes": 100, "decoder": "rate"}, 11_220_132),
        ("sg_resnet18", {"num_classes": 10, "decoder": "rate"}, 11_173_962),
        ("sg_resnet18", {"num_classes": 100}, 11_253_030),
        ("sg_resnet10", {"num_classes": 100, "decoder": "rate"}, 4_949_412),
        ("sg_resnet34", {"num_classes": 100, "decoder": "rate"}, 21_328_292),
        ("sg_resnet50", {"num_classes": 100}, 23_705_252),
        ("sg_resnet18", {"num_classes": 100, "decoder": "rate", "connection": "bsg_star"}, 11_220_132 + 3_840),
        ("sew_resnet18", {"num_classes": 100}, 11_220_132),
        ("spiking_resnet34", {"num_classes": 100}, 21_328_292),
        ("resnet18", {"num_classes": 100}, 11_220_132),
        ("resnet50", {"num_classes": 100}, 23_705_252),
    ],
)
def test_parameter_pins(name: str, overrides: dict[str, object], expected: int) -> None:
    with torch.device("meta"):
        model = build_model(model_config(name, **overrides))
    assert parameters(model) == expected


def tiny(**overrides: object) -> SGResNetConfig:
    return SGResNetConfig(**{"stages": (2, 2), "width": 0.25, "num_classes": 5, **overrides})


def images(size: int = 16) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 3, size, size)


@pytest.mark.parametrize("connection", ["bsg", "bsg_star", "and", "iand", "post_add"])
def test_block_outputs_are_spikes(connection: str) -> None:
    model = build_model(tiny(connection=connection))
    for output in model.forward_blocks(images()):
        assert set(output.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(("stem", "side"), [("cifar", 16), ("strided", 8), ("imagenet", 4)])
def test_stems_reduce_pictures(stem: str, side: int) -> None:
    assert tiny(stem=stem).stem_stride == 16 // side
    assert [output.shape[-1] for output in build_model(tiny(stem=stem)).forward_features(images())] == [side, side // 2]


def test_add_makes_integers_up_to_three_in_resnet18() -> None:
    # Each block adds at most 1 to its shortcut's spikes, and the first block's shortcut is at most 1.
    torch.manual_seed(0)
    model = build_model(model_config("sew_resnet18", width=0.25))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 5.0)  # so that nearly everything fires
    outputs = model.forward_features(images())
    assert [output.max().item() for output in outputs] == [3.0] * 4
    assert all(torch.equal(output, output.round()) for output in outputs)


@pytest.mark.parametrize("connection", ["bsg", "bsg_star", "add", "iand"])
def test_a_silent_residual_is_identity(connection: str) -> None:
    block = ResidualBlock(tiny(connection=connection), 16, 16, stride=1)
    nn.init.zeros_(block.units[-1].bn.weight)
    x = (torch.rand(4, 2, 16, 8, 8) < 0.3).float().requires_grad_()
    y = block(x)
    assert torch.equal(y, x)
    nn.init.constant_(block.units[-1].bn.bias, 2.0)
    assert not torch.equal(block(x), x)


def test_zero_init_residual_makes_unchanged_shapes_identity() -> None:
    model = build_model(tiny(stages=(2,), zero_init_residual=True))
    x = images()
    assert torch.equal(model.forward_features(x)[-1], model.stem(x))
    assert not torch.equal(build_model(tiny(stages=(2,))).forward_features(x)[-1], model.stem(x))


@pytest.mark.parametrize(
    "neuron",
    [
        {},
        {"kind": "lif", "tau": 3.0},
        {"kind": "lif", "tau": 4 / 3, "v_threshold": 0.3, "v_reset": -0.1},
        {"kind": "lif", "decay_input": False, "v_reset": None},
        {"kind": "plif"},
        {"kind": "ilif", "bound": 1, "input_scale": 0.5},
    ],
    ids=str,
)
def test_zero_init_residual_of_and_fires_at_every_step(neuron: dict[str, object]) -> None:
    """A residual that never fires would silence the network."""
    torch.manual_seed(0)
    model = build_model(tiny(stages=(2,), connection="and", neuron=neuron, zero_init_residual=True, decoder="rate"))
    x = images()
    kept = model.forward_features(x)[-1]
    assert kept.any()
    assert torch.equal(kept, model.stem(x))
    for block in model.stages[0]:
        assert not block.units[-1].bn.weight.any()
        block.units[-1].bn.bias.data.mul_(0.3)
    assert not torch.equal(model.forward_features(x)[-1], kept)


def test_zero_init_residual_of_and_starts_at_the_threshold() -> None:
    model = build_model(tiny(stages=(1,), connection="and", zero_init_residual=True))
    assert set(model.stages[0][0].units[-1].bn.bias.tolist()) == {1.0}


@pytest.mark.parametrize("connection", ["bsg", "bsg_star"])
def test_gate_gradient_reaches_every_block(connection: str) -> None:
    norms = []
    for gradient in ("literal", "exact"):
        torch.manual_seed(0)
        model = build_model(tiny(stages=(1, 1), connection=connection, gate_gradient=gradient))
        assert {block.units[-1].gate.gradient for stage in model.stages for block in stage} == {gradient}
        model(images()).square().sum().backward()
        norms.append([block.convs[0].weight.grad.norm().item() for stage in model.stages for block in stage])
    literal, exact = norms
    assert all(a != b for a, b in zip(literal, exact, strict=True))


@pytest.mark.parametrize(
    ("connection", "spiking"), [("bsg", True), ("add", True), ("bsg_star", True), ("post_add", False), ("ann", False)]
)
def test_downsampling_shortcut_spikes_only_before_gates(connection: str, spiking: bool) -> None:
    shortcut = ResidualBlock(tiny(connection=connection), 16, 32, stride=2).shortcut
    assert shortcut is not None
    assert shortcut.conv.kernel_size == (1, 1)
    assert isinstance(shortcut.unit, nn.BatchNorm2d) != spiking


def test_post_add_is_the_neuron_of_the_sum() -> None:
    block = ResidualBlock(tiny(connection="post_add"), 16, 16, stride=1)
    x = (torch.rand(4, 2, 16, 8, 8) < 0.3).float()
    y = block(x)
    z = block.convs[1](block.units[0](block.convs[0](x.flatten(0, 1))).flatten(0, 1))
    current = nn.functional.batch_norm(z, None, None, training=True).unflatten(0, (4, 2)) + x
    assert torch.equal(y, block.units[1].neuron(current))


def test_ann_twin_is_torchvisions_resnet() -> None:
    torchvision = pytest.importorskip("torchvision")
    ours = build_model(model_config("resnet18", stem="imagenet", num_classes=7)).eval()
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    names = {"fc.": "classifier.", "downsample.0": "shortcut.conv", "downsample.1": "shortcut.unit"}
    names |= {f"layer{stage + 1}": f"stages.{stage}" for stage in range(4)}
    names |= {f".conv{n + 1}": f".convs.{n}" for n in range(2)} | {f".bn{n + 1}": f".units.{n}.bn" for n in range(2)}
    stem = {"conv1.": "stem.conv.", "bn1.": "stem.unit.bn."}
    weights, mapped = ours.state_dict(), {}
    for key in theirs.state_dict():
        ours_key = key
        for old, new in (names if key.startswith(("layer", "fc")) else stem).items():
            ours_key = ours_key.replace(old, new)
        mapped[key] = weights.pop(ours_key)
    assert not weights
    theirs.load_state_dict(mapped)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_ann_twin_is_a_lone_override() -> None:
    model = build_model(model_config("sg_resnet_tiny", connection="ann", timesteps=4))
    assert model.timesteps == 1
    assert model.config.timesteps == 4
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert not any(hasattr(module, "v_threshold") for module in model.modules())


def test_static_images_equal_repeated_frames() -> None:
    # Batch norm sees T copies, so the statistics agree up to rounding; in eval mode everything does.
    model = build_model(tiny()).eval()
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), model(x.expand(4, *x.shape)))


def test_order_of_frames_matters() -> None:
    model = build_model(tiny(decoder="rate"))
    frames = torch.randn(4, 6, 3, 16, 16)
    assert not torch.allclose(model(frames), model(frames.flip(0)))


@pytest.mark.parametrize(("stem", "first", "last"), [("cifar", (16, 16), (8, 8)), ("imagenet", (4, 4), (2, 2))])
def test_stems(stem: str, first: tuple[int, int], last: tuple[int, int]) -> None:
    model = build_model(tiny(stem=stem))
    outputs = model.forward_features(images())
    assert outputs[0].shape == (4, 6, 16, *first)
    assert outputs[-1].shape == (4, 6, 32, *last)
    assert model.stem.conv.in_channels == 3


def test_convolutions_start_from_kaiming_fan_out() -> None:
    conv = build_model(model_config("sg_resnet10")).stages[3][0].convs[1]
    assert conv.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("connection", ["bsg", "post_add", "ann"])
def test_bottleneck_expands_by_four(connection: str) -> None:
    model = build_model(tiny(block="bottleneck", connection=connection))
    assert [output.shape[2] for output in model.forward_features(images())] == [64, 128]
    assert model(images()).shape == (6, 5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("connection", ["bsg", "bsg_star", "add", "post_add", "ann"])
def test_autocast_trains(connection: str, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = build_model(tiny(connection=connection)).to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images().to(memory_format=layout))
    logits.float().square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() and grad.dtype == torch.float32 for grad in gradients)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"width": 0.51}, "width=0.51 gives 32.64 channels"),
        ({"stages": (2, 0)}, "every stage must have at least 1 block"),
        ({"asd_channel_reduction": 7}, "asd_channel_reduction=7 must divide the last stage's 32 channels"),
        ({"asd_temporal_reduction": 3}, "asd_temporal_reduction=3 must divide timesteps=4"),
        ({"timesteps": 0}, "timesteps"),
        ({"gate_threshold": 0.0}, "gate_threshold"),
        ({"connection": "or"}, "connection"),
        ({"step": 4}, "step"),
    ],
)
def test_bad_configurations_name_the_field(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny(**bad)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 16), r"expected \[B, C, H, W\]"),
        ((2, 1, 16, 16), "expected C=3; .* set in_channels"),
        ((5, 2, 3, 16, 16), "T=5, expected T=4 of timesteps=4"),
    ],
)
def test_wrong_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(tiny())(torch.zeros(shape))


def test_integer_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        build_model(tiny())(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
