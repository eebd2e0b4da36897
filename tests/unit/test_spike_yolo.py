"""SpikeYOLO and Spiking YOLOv8: parameter pins, blocks, time, variants, refusals."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from spikefleet_models import build_model, model_config
from spikefleet_models.detection import Objects
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.spike_yolo.blocks import (
    SN,
    BatchNormAndPad,
    Block1,
    Plan,
    RepConv,
    SpikingRepConv,
    Stem,
    TransformerBlock,
)
from spikefleet_models.spike_yolo.config import SpikeYoloConfig, SpikingYoloV8Config
from spikefleet_models.spike_yolo.network import LAYERS, SpikeYolo

TINY: dict[str, Any] = {"width": 0.0625, "depth": 0.1, "stem_stride": 2, "box_channels": 16, "num_classes": 3}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiny(**overrides: Any) -> SpikeYolo:
    """A small network whose running statistics are those of a batch, so that it fires in evaluation."""
    torch.manual_seed(0)
    model = SpikeYolo(SpikeYoloConfig(**{**TINY, **overrides}))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(pictures())
    for norm in norms:
        norm.momentum = 0.03
    return model


def pictures(batch: int = 4, side: int = 64) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("spike_yolo_n", {}, 13_271_632),
        ("spike_yolo_s", {}, 23_153_024),
        ("spike_yolo_m", {}, 47_841_856),
        ("spike_yolo_l", {}, 68_478_400),
        ("spike_yolo_n", {"num_classes": 2}, 13_248_934),
        ("spike_yolo_s", {"num_classes": 2}, 23_122_838),
        ("spike_yolo_ann_s", {}, 23_153_024),
        ("spike_yolo_s_no_rep", {}, 23_178_944),
        ("spike_yolo_s_block2", {}, 19_917_760),
        ("spike_yolo_s_transformer", {}, 24_504_704),
        ("spike_yolo_s_anchor", {}, 21_235_261),
        ("spiking_yolov8_m", {}, 25_902_640 + 48),  # YOLOv8m and the stem's bias
        ("spike_yolo_tiny", {"num_classes": 10}, 357_430),
    ],
)
def test_parameter_pins(name: str, overrides: dict[str, object], expected: int) -> None:
    with torch.device("meta"):
        assert parameters(build_model(model_config(name, **overrides))) == expected


def test_parameters_of_every_published_layer() -> None:
    with torch.device("meta"):
        model = build_model(model_config("spike_yolo_s"))
    counts = {number: parameters(model.get_submodule(name)) for number, name in LAYERS.items()}
    assert [counts.get(number, 0) for number in range(27)] == [
        *(0, 9_600, 319_680, 74_112, 2_523_904, 295_680, 4_071_168, 1_181_184, 3_492_864, 656_896, 131_584, 0),
        *(1_357_056, 0, 65_792, 0, 1_261_952, 0, 33_024, 1_261_952, 147_712, 0, 1_357_056, 590_336, 0, 2_174_464),
        2_147_008,
    ]
    assert sum(counts.values()) == parameters(model)


def test_neuron_count_and_batch_norm_constants() -> None:
    with torch.device("meta"):
        small, large = build_model(model_config("spike_yolo_s")), build_model(model_config("spike_yolo_m"))
    assert (len(spiking_nodes(small)), len(spiking_nodes(large))) == (88, 108)
    norms = [module for module in small.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}


def test_biases_of_the_head_start_from_the_prior() -> None:
    model = build_model(model_config("spike_yolo_tiny", num_classes=10))
    for level, stride in enumerate((4, 8, 16)):
        assert model.head.box[level][-1].conv.bias.unique().tolist() == [1.0]
        expected = math.log(5 / 10 / (640 / stride) ** 2)
        assert model.head.classes[level][-1].conv.bias.unique().item() == pytest.approx(expected)


@pytest.mark.parametrize(("stem_stride", "strides"), [(2, (4, 8, 16)), (4, (8, 16, 32))])
def test_shapes_and_strides(stem_stride: int, strides: tuple[int, ...]) -> None:
    model = tiny(stem_stride=stem_stride)
    outputs = model(torch.rand(2, 3, 64, 96))
    assert model.strides == strides
    assert [tuple(output.shape) for output in outputs] == [(2, 67, 64 // s, 96 // s) for s in strides]


def test_neurons_emit_integers_up_to_the_bound() -> None:
    model = tiny(neuron=NeuronConfig(kind="ilif", bound=2), timesteps=2)
    seen = set()
    for node in spiking_nodes(model).values():
        node.register_forward_hook(lambda _, __, emitted: seen.update(emitted.unique().tolist()))
    model(pictures())
    assert seen == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("overrides", [{}, {"reparameterise": False}, {"high_block": "transformer"}])
def test_pictures_do_not_reach_one_another(overrides: dict[str, Any]) -> None:
    # A neuron that mistakes the batch for time would carry its membrane from one picture to the next.
    model = tiny(timesteps=2, **overrides).eval().double()
    images = pictures().double()
    with torch.no_grad():
        together = model(images)
        alone = [model(image[None]) for image in images]
    for level, output in enumerate(together):
        torch.testing.assert_close(output, torch.cat([outputs[level] for outputs in alone]), rtol=0, atol=1e-10)
    assert all(output.std(0).max() > 1e-3 for output in together)


def test_static_pictures_equal_repeated_frames_and_time_matters() -> None:
    model = tiny(timesteps=2).eval()
    images = pictures()
    with torch.no_grad():
        static = model(images)
        frames = torch.stack((images, images.flip(0)))
        assert all(map(torch.equal, static, model(images.expand(2, *images.shape))))
        assert not torch.allclose(model(frames)[0], model(frames.flip(0))[0], atol=1e-4)
        assert not torch.allclose(static[0], tiny().eval()(images)[0], atol=1e-4)


def test_outputs_are_the_mean_over_time() -> None:
    model = tiny(timesteps=2).eval()
    with torch.no_grad():
        features = model.forward_features(pictures())
        assert features[0].shape[0] == 8
        steps = torch.cat((model.head.box[0](features[0]), model.head.classes[0](features[0])), dim=1)
        torch.testing.assert_close(model(pictures())[0], (steps[:4] + steps[4:]) / 2)


def test_stem_runs_once_for_all_steps() -> None:
    model = tiny(timesteps=2)
    calls: list[int] = []
    model.stem.conv.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    model(pictures())
    assert calls == [4]


@pytest.mark.parametrize(("kernel", "stride", "side"), [(7, 4, 16), (7, 2, 32), (3, 2, 32)])
def test_stem_halves_exactly(kernel: int, stride: int, side: int) -> None:
    stem = Stem(Plan(None, 1), 3, 8, kernel, stride)
    assert stem(torch.rand(1, 3, 64, 64)).shape[2:] == (side, side)
    assert stem.conv.padding == ({(7, 4): 2, (7, 2): 3, (3, 2): 1}[kernel, stride],) * 2


def random_norm(channels: int) -> BatchNormAndPad:
    pad = BatchNormAndPad(channels)
    torch.manual_seed(2)
    for tensor in (pad.bn.weight, pad.bn.bias, pad.bn.running_mean, pad.bn.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    return pad


def test_padding_is_the_batch_norm_of_zeros() -> None:
    pad = random_norm(5).double().eval()
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(pad(x), pad.bn(F.pad(x, (1, 1, 1, 1))), rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_padding_in_training_has_batch_statistics_inside_and_running_ones_outside(layout: torch.memory_format) -> None:
    pad = random_norm(5).train()
    x = torch.randn(2, 5, 6, 7).to(memory_format=layout).requires_grad_()
    y = pad(x)
    assert y.is_contiguous(memory_format=layout)
    normalised = F.batch_norm(x, None, None, pad.bn.weight, pad.bn.bias, training=True, eps=1e-3)
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], normalised)
    after = F.batch_norm(
        torch.zeros(1, 5, 1, 1), pad.bn.running_mean, pad.bn.running_var, pad.bn.weight, pad.bn.bias, eps=1e-3
    )
    assert (y[:, :, 0, :] - after[:, :, 0]).abs().max() < 1e-6
    assert (y[:, :, :, -1] - after[:, :, 0]).abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(y[:, :, 0].sum() + y[:, :, :, 0].sum(), pad.bn.bias)
    assert not gradient.any()  # the border sends none
    assert torch.autograd.grad(pad(x).square().sum(), pad.bn.bias)[0].any()


def test_gradient_passes_the_padding() -> None:
    pad = random_norm(3).double().eval()
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pad, (x,))


def test_blocks_add_to_the_membrane() -> None:
    block = Block1(Plan(NeuronConfig(kind="ilif"), 1), 8, 4)
    for norm in (block.sep_conv.project.bn, block.project.bn):
        nn.init.zeros_(norm.weight)
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(block(x), x)


def test_no_neuron_inside_a_rep_conv_but_in_the_variant() -> None:
    plan = Plan(NeuronConfig(kind="ilif"), 1)
    assert not any(isinstance(module, SN) for module in RepConv(8, 8).modules())
    assert sum(isinstance(module, SN) for module in SpikingRepConv(plan, 8, 8).modules()) == 2


def test_attention_is_linear_attention() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(Plan(None, 1), 16).double().eval()
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    spikes = block.sn(x)
    q, k, v = (
        sn(conv(spikes)).flatten(2).unflatten(1, (8, 2)).transpose(2, 3)
        for sn, conv in (
            (block.query_sn, block.queries),
            (block.key_sn, block.keys),
            (block.value_sn, block.values),
        )
    )
    # [B, heads, N, d]; quadratic order, which gives the same without a softmax.
    attended = ((q @ k.transpose(-2, -1)) @ v * 0.125).transpose(2, 3).reshape(x.shape)
    y = x + block.project(attended)
    torch.testing.assert_close(block(x), y + block.mlp_project(block.mlp_expand(y)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"timesteps": 2}, {"reparameterise": False}, {"high_block": "transformer"}, {"activation": "relu"}],
)
def test_autocast_trains(overrides: dict[str, Any], layout: torch.memory_format) -> None:
    model = SpikeYolo(SpikeYoloConfig(**{**TINY, **overrides})).to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(pictures(2).to(memory_format=layout))
    sum(output.float().square().mean() for output in outputs).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in trained)


def test_channels_last_gives_the_same() -> None:
    model, images = tiny(timesteps=2).eval().double(), pictures().double()
    with torch.no_grad():
        expected = model(images)
        outputs = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value, rtol=0, atol=1e-10)


def test_ann_twin_has_relu_and_one_step() -> None:
    model = tiny(activation="relu", timesteps=4)
    assert model.timesteps == 1
    assert not spiking_nodes(model)
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == len(spiking_nodes(tiny()))


def test_anchor_head_has_three_anchors_a_cell() -> None:
    outputs = tiny(head="anchor", timesteps=2)(pictures())
    assert [tuple(output.shape) for output in outputs] == [(4, 24, 64 // s, 64 // s) for s in (4, 8, 16)]


@pytest.mark.parametrize(("depth", "repeats"), [(0.33, (1, 2, 3, 1)), (0.5, (2, 3, 4, 2)), (0.1, (1, 1, 1, 1))])
def test_repeats_round_half_to_even(depth: float, repeats: tuple[int, ...]) -> None:
    assert SpikeYoloConfig(depth=depth).stage_repeats == repeats


def test_spiking_yolov8_channels_and_repeats() -> None:
    config = SpikingYoloV8Config()
    assert [config.channels(c) for c in (64, 128, 256, 512, 1024)] == [48, 96, 192, 384, 576]
    assert (config.repeats(3), config.repeats(6)) == (2, 4)


def test_it_learns_one_batch() -> None:
    torch.manual_seed(0)
    model = build_model(model_config("spike_yolo_tiny", num_classes=3))
    criterion = model.config.build_criterion()
    objects = [Objects(torch.tensor([[8.0 + 4 * i, 10.0, 40.0, 50.0]]), torch.tensor([i % 3])) for i in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = criterion.loss(model(pictures()), objects, (64, 64))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"width": 0.01}, "width=0.01 gives 1 channels"),
        (
            {"width": 0.04, "high_block": "transformer"},
            "gives the transformer blocks 20, 40, 20, 40 channels; .* 8 heads",
        ),
        ({"stem_stride": 3}, "stem_stride"),
        ({"neuron": {"kind": "ilif", "v_threshold": 0.5}}, "v_threshold"),
        ({"head": "anchor_based"}, "head"),
        ({"criterion": {"topk": 0}}, "topk"),
        ({"scale": "s"}, "scale"),
    ],
)
def test_bad_configurations_name_the_field(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SpikeYoloConfig(**{**TINY, **bad})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"expected \[B, C, H, W\]"),
        ((2, 1, 64, 64), "expected C=3; .* set in_channels"),
        ((0, 2, 3, 64, 64), "T=0, expected at least 1"),
        ((2, 3, 64, 72), "sides are 64x72, expected multiples of 16"),
    ],
)
def test_wrong_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    model = SpikeYolo(SpikeYoloConfig(**TINY, timesteps=2))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
