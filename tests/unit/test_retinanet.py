"""Spiking RetinaNet: parameter pins, anchors, shapes, loss against a literal one, gradients, overfitting, refusals."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from spikefleet_models.detection import Objects
from spikefleet_models.retinanet import RetinaNet
from spikefleet_models.retinanet_config import RetinaCriterionConfig, RetinaNetConfig
from spikefleet_models.retinanet_loss import RetinaCriterion, match_densely
from spikefleet_models.sg_resnet_config import SGResNetConfig

R18, R34 = (2, 2, 2, 2), (3, 4, 6, 3)
TINY: dict[str, Any] = {
    "backbone": {"stages": (1, 1, 1, 1), "width": 0.25, "stem": "imagenet", "timesteps": 2},
    "num_classes": 3,
    "extra_levels": 0,
    "fpn_channels": 32,
    "criterion": {"anchor_scale": 2.0},
}
NO_OBJECTS = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def tiny(**backbone: Any) -> RetinaNet:
    torch.manual_seed(0)
    return RetinaNet(RetinaNetConfig(**{**TINY, "backbone": {**TINY["backbone"], **backbone}}))


def criterion_of(model: RetinaNet, **fields: Any) -> RetinaCriterion:
    config = model.config.criterion.model_copy(update=fields)
    return RetinaCriterion(config, model.config.num_classes, model.config.strides)


def scene(side: int = 96) -> tuple[Tensor, Objects]:
    """A grey picture with a bright and a dark rectangle."""
    picture = torch.full((1, 3, side, side), 0.1)
    boxes = torch.tensor([[10.0, 14, 34, 36], [52, 40, 82, 76]])
    for (x1, y1, x2, y2), colour in zip(boxes.int().tolist(), ((2.0, 1.0, 0.0), (-1.0, -2.0, 1.0)), strict=True):
        picture[0, :, y1:y2, x1:x2] = torch.tensor(colour)[:, None, None]
    return picture, Objects(boxes, torch.tensor([0, 2]))


@pytest.mark.parametrize(
    ("stages", "fields", "expected"),
    [
        (R18, {"connection": "ann"}, 21_410_100),
        (R18, {"decoder": "rate"}, 21_410_100),
        (R18, {}, 21_453_498),
        (R34, {"connection": "ann"}, 31_518_260),
        (R34, {}, 31_561_658),
    ],
)
def test_parameters_are_the_papers(stages: tuple[int, ...], fields: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = RetinaNet(RetinaNetConfig(backbone=SGResNetConfig(stages=stages, stem="imagenet", **fields)))
    assert sum(p.numel() for p in model.parameters()) == expected


def test_declared_strides_and_levels_are_real() -> None:
    config = RetinaNetConfig(
        backbone=SGResNetConfig(stages=(1, 1, 1, 1), width=0.25, stem="imagenet", decoder="rate", timesteps=1),
        num_classes=5,
        fpn_channels=16,
    )
    assert config.strides == (8, 16, 32, 64, 128)
    outputs = RetinaNet(config)(torch.randn(2, 3, 100, 140))
    grids = [(13, 18), (7, 9), (4, 5), (2, 3), (1, 2)]
    assert [tuple(output.shape) for output in outputs] == [(2, 9 * (5 + 4), *grid) for grid in grids]
    found = RetinaCriterion(config.criterion, 5, config.strides).detect(outputs, (100, 140))
    assert len(found) == 2

    small = RetinaNetConfig(
        backbone=SGResNetConfig(stages=(1, 1, 1), width=0.25, decoder="rate"), taps=2, extra_levels=0, fpn_channels=16
    )
    assert small.strides == (2, 4)
    assert [output.shape[-1] for output in RetinaNet(small)(torch.randn(1, 3, 16, 16))] == [8, 4]


def test_level_6_is_a_convolution_of_the_last_stage() -> None:
    """Also where the last stage has as many channels as the pyramid, which makes torchvision's block take P5."""
    model = RetinaNet(RetinaNetConfig(**{**TINY, "extra_levels": 2, "fpn_channels": 128}))
    seen: list[Tensor] = []
    model.pyramid.extra_blocks.p6.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    decoded: list[Tensor] = []
    model.decoders[-1].register_forward_hook(lambda module, args, output: decoded.append(output))
    model(torch.randn(1, 3, 64, 64))
    assert seen[0] is decoded[0]


def test_anchors() -> None:
    criterion = RetinaCriterion(RetinaCriterionConfig(), 80, (8, 16, 32, 64, 128))
    grids = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    levels = criterion.anchors(grids, torch.zeros(()))
    assert [len(level) for level in levels] == [9 * rows * columns for rows, columns in grids]
    sides = levels[0][:9, 2:] - levels[0][:9, :2]
    assert (levels[0][:9, 2:] + levels[0][:9, :2] == 0).all()  # centred on the top left corner of the cell
    ratio, side = torch.tensor([0.5, 1, 2]).repeat_interleave(3), 32 * 2 ** (torch.arange(3) / 3).repeat(3)
    expected = torch.stack((side / ratio.sqrt(), side * ratio.sqrt()), dim=1)
    torch.testing.assert_close(sides, expected, atol=1.0, rtol=0)
    second_cell, second_row = levels[1][9:18] - levels[1][:9], levels[1][84 * 9 : 85 * 9] - levels[1][:9]
    assert (second_cell == torch.tensor([16.0, 0, 16, 0])).all()
    assert (second_row == torch.tensor([0.0, 16, 0, 16])).all()
    small = RetinaCriterion(RetinaCriterionConfig(anchor_scale=2, scales_per_octave=1, aspect_ratios=(1.0,)), 3, (4,))
    assert small.anchors([(1, 1)], torch.zeros(()))[0].tolist() == [[-4, -4, 4, 4]]


def literal_loss(
    criterion: RetinaCriterion, outputs: tuple[Tensor, ...], objects: list[Objects]
) -> tuple[float, float]:
    """Focal and L1 loss by loops over pictures, cells, anchors and objects, from the channels' description."""
    config, K = criterion.config, criterion.num_classes
    A = config.anchors_per_cell
    anchors = criterion.anchors([(level.shape[2], level.shape[3]) for level in outputs], outputs[0])
    cls = box = 0.0
    positives = 0
    for picture, (boxes, labels) in enumerate(objects):
        overlaps = box_iou(torch.cat(anchors), boxes.to(anchors[0]))
        best_of_object = overlaps.amax(0) if len(boxes) else None
        index = 0
        for level, level_anchors in zip(outputs, anchors, strict=True):
            for position, anchor in enumerate(level_anchors):
                cell, a = divmod(position, A)
                row, column = divmod(cell, level.shape[3])
                values = level[picture, :, row, column]
                overlap = overlaps[index]
                index += 1
                owner = None
                if best_of_object is not None:
                    best = int(overlap.argmax())
                    if overlap[best] >= 0.5 or (overlap == best_of_object).any():
                        owner = best
                    elif overlap[best] >= 0.4:
                        continue
                for k in range(K):
                    p = values[a * K + k].sigmoid().item()
                    positive = owner is not None and int(labels[owner]) == k
                    p_t, alpha = (p, 0.25) if positive else (1 - p, 0.75)
                    cls -= alpha * (1 - p_t) ** 2 * float(torch.tensor(p_t, dtype=torch.float64).log())
                if owner is not None:
                    positives += 1
                    codes = values[A * K + 4 * a : A * K + 4 * a + 4]
                    target = BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(boxes[owner][None].to(anchor), anchor[None])
                    box += (codes - target[0]).abs().sum().item()
    return cls / max(1, positives), box / max(1, positives)


def test_loss_is_the_literal_one() -> None:
    torch.manual_seed(0)
    config = RetinaCriterionConfig(scales_per_octave=2, aspect_ratios=(0.5, 1.0), anchor_scale=2.0)
    criterion = RetinaCriterion(config, 3, (8, 16))
    outputs = tuple(torch.randn(3, 4 * 7, side, side, dtype=torch.float64) for side in (6, 3))
    objects = [
        Objects(torch.tensor([[2.0, 3, 20, 17], [16, 20, 44, 47], [21, 5, 24, 8]]), torch.tensor([1, 0, 2])),
        NO_OBJECTS,
        Objects(torch.tensor([[4.0, 4, 22, 26]]), torch.tensor([2])),
    ]
    result = criterion.loss(outputs, objects, (48, 48))
    cls, box = literal_loss(criterion, outputs, objects)
    assert result["cls"].item() == pytest.approx(cls, rel=1e-9)
    assert result["box"].item() == pytest.approx(box, rel=1e-9)
    assert result["loss"].item() == pytest.approx(cls + box)

    relabelled = [Objects(entry.boxes, (entry.labels + 1) % 3) for entry in objects]
    assert criterion.loss(outputs, relabelled, (48, 48))["cls"].item() != pytest.approx(cls, rel=1e-3)
    smooth = RetinaCriterion(config.model_copy(update={"box_loss": "smooth_l1"}), 3, (8, 16))
    assert 0 < smooth.loss(outputs, objects, (48, 48))["box"].item() < box


@pytest.mark.parametrize(
    "fields", [{}, {"low_quality_matches": False}, {"negative_iou": 0.0}, {"negative_iou": 0.5}, {"positive_iou": 1.0}]
)
def test_matching_without_waiting_is_torchvisions(fields: dict[str, Any]) -> None:
    config = RetinaCriterionConfig(anchor_scale=2.0, **fields)
    criterion = RetinaCriterion(config, 3, (8, 16))
    anchors = torch.cat(criterion.anchors([(6, 6), (3, 3)], torch.zeros(())))
    generator = torch.Generator().manual_seed(0)
    found = []
    for count in (0, 1, 2, 5, 9):
        corners = torch.randint(0, 30, (count, 2), generator=generator).float()
        boxes = torch.cat((corners, corners + torch.randint(0, 18, (count, 2), generator=generator)), 1)
        boxes = torch.cat((boxes, boxes[:2], anchors[:count]))  # ties, boxes without area, boxes that are anchors
        for some in (boxes, boxes[:1] * 0, boxes[:0]):
            expected = criterion._match(some, anchors)
            found.append(expected)
            assert torch.equal(match_densely(some, anchors, config), expected)
    assert len(torch.cat(found).unique()) > 3
    other = config.model_copy(update={"positive_iou": 0.45, "negative_iou": 0.2})
    assert not torch.equal(match_densely(boxes, anchors, other), criterion._match(boxes, anchors))


def test_an_object_without_area_changes_nothing() -> None:
    criterion = RetinaCriterion(RetinaCriterionConfig(), 3, (8,))
    outputs = (torch.randn(1, 9 * 7, 4, 4),)
    real = Objects(torch.tensor([[4.0, 2, 28, 30]]), torch.tensor([1]))
    degenerate = torch.tensor([[9.0, 9, 9, 20]])
    both = Objects(torch.cat((degenerate, real.boxes)), torch.tensor([0, 1]))
    expected, result = (criterion.loss(outputs, [entry], (32, 32)) for entry in (real, both))
    assert all(torch.equal(result[key], expected[key]) for key in expected)
    alone = criterion.loss(outputs, [Objects(degenerate, torch.tensor([0]))], (32, 32))
    assert torch.equal(alone["loss"], criterion.loss(outputs, [NO_OBJECTS], (32, 32))["loss"])


@pytest.mark.parametrize(
    "backbone",
    [
        {"timesteps": 4},
        {"decoder": "rate"},
        {"connection": "ann"},
        {"connection": "add", "decoder": "rate", "timesteps": 1},
        {"connection": "bsg_star", "timesteps": 4},
    ],
    ids=str,
)
def test_gradient_reaches_every_parameter(backbone: dict[str, Any]) -> None:
    model = tiny(**backbone)
    picture, objects = scene()
    pictures = torch.cat((picture, torch.randn(1, 3, 96, 96)))
    result = criterion_of(model).loss(model(pictures), [objects, NO_OBJECTS], (96, 96))
    result["loss"].backward()
    assert all(part.isfinite() for part in result.values())
    assert result["box"] > 0
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert not [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()]


def test_norm_in_pyramid_and_heads_is_an_option() -> None:
    """Every convolution of them but the last ones of the heads is normalised; all parameters of the norms learn."""
    torch.manual_seed(0)
    plain, normed = tiny(), RetinaNet(RetinaNetConfig(**TINY, norm="group", norm_groups=8))
    assert not [module for module in plain.modules() if isinstance(module, nn.GroupNorm)]
    groups = {name: module for name, module in normed.named_modules() if isinstance(module, nn.GroupNorm)}
    parts = [name.split(".")[0] for name in groups]
    assert {part: parts.count(part) for part in parts} == {"pyramid": 6, "classification": 4, "regression": 4}
    assert {module.num_groups for module in groups.values()} == {8}
    weights = {name for name, parameter in plain.named_parameters() if parameter.ndim > 1}
    assert weights == {name for name, parameter in normed.named_parameters() if parameter.ndim > 1}
    image, objects = scene()
    criterion_of(normed).loss(normed(image), [objects], (96, 96))["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for module in groups.values() for p in module.parameters())
    with pytest.raises(ValidationError, match="norm_groups=32 must divide fpn_channels=48 for norm=group"):
        RetinaNetConfig(**{**TINY, "fpn_channels": 48}, norm="group")


@pytest.mark.parametrize("connection", ["bsg", "post_add", "ann"])
def test_momentum_of_the_statistics(connection: str) -> None:
    """A step moves running means by that share of the way to the batch's."""
    image = torch.cat((scene()[0], torch.randn(1, 3, 96, 96)))

    def moved(**fields: Any) -> dict[str, Tensor]:
        model = tiny(connection=connection, **fields)
        model(image)
        return {name: buffer for name, buffer in model.named_buffers() if name.endswith("running_mean")}

    usual, slow = moved(), moved(norm_momentum=0.01)
    assert len(usual) > 9
    for name, mean in usual.items():
        torch.testing.assert_close(slow[name], mean / 10)


def test_decoders_are_independent() -> None:
    model = tiny()
    assert len(model.decoders) == 3
    weights = [next(decoder.parameters()) for decoder in model.decoders]
    assert len({id(weight) for weight in weights}) == 3
    assert [decoder.channel[2].out_features for decoder in model.decoders] == [32, 64, 128]


def test_frames_of_events() -> None:
    model = tiny().eval()
    picture, _ = scene()
    with torch.no_grad():
        still = model(picture)
        frames = model(picture.expand(2, -1, -1, -1, -1))
        # The stem's convolution sees other batch sizes, so its sums may differ in the last bit.
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(still, frames, strict=True))
        with pytest.raises(ValueError, match="timesteps=2"):
            model(picture.expand(3, -1, -1, -1, -1))


def test_no_objects_at_all() -> None:
    model = tiny()
    result = criterion_of(model).loss(model(scene()[0]), [NO_OBJECTS], (96, 96))
    result["loss"].backward()
    assert result["box"] == 0
    assert result["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_overfits_one_picture() -> None:
    model = tiny()
    criterion = criterion_of(model)
    picture, objects = scene()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    losses = []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.002 if step < 120 else 0.0005  # boxes settle, however a CPU rounds
        optimizer.zero_grad()
        loss = criterion.loss(model(picture), [objects], (96, 96))["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    found = criterion.detect(model(picture), (96, 96))[0]
    for box, label in zip(objects.boxes, objects.labels, strict=True):
        best = int((found.labels == label).nonzero()[0])  # the most certain of its class
        assert found.scores[best] > 0.3
        assert box_iou(found.boxes[best : best + 1], box[None]) > 0.5


def test_detections_by_hand() -> None:
    config = RetinaCriterionConfig(scales_per_octave=1, aspect_ratios=(1.0,), anchor_scale=2.0)
    criterion = RetinaCriterion(config, 2, (8,))
    level = torch.zeros(1, 2 + 4, 4, 4)
    level[:, :2] = -20.0
    level[0, 1, 1, 2] = torch.tensor(0.9).logit()  # anchor of 16x16 around x = 16, y = 8
    level[0, 2:, 1, 2] = torch.tensor([0.25, 0, 0, torch.tensor(0.5).log()])  # 4 to the right, half as high
    level[0, 0, 3, 3] = torch.tensor(0.06).logit()
    level[0, 0, 0, 0] = torch.tensor(0.04).logit()  # below the threshold
    found = criterion.detect((level,), (32, 32))[0]
    assert found.labels.tolist() == [1, 0]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.06]))
    torch.testing.assert_close(found.boxes, torch.tensor([[12.0, 4, 28, 12], [16, 16, 32, 32]]))
    limited = RetinaCriterion(config.model_copy(update={"candidates_per_level": 1}), 2, (8,))
    assert limited.detect((level,), (32, 32))[0].labels.tolist() == [1]
    nothing = criterion.detect((torch.full_like(level, -20.0),), (32, 32))[0]
    assert nothing.boxes.shape == (0, 4)


def test_fp32_inside_autocast() -> None:
    model = tiny()
    criterion = criterion_of(model)
    picture, objects = scene()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(picture)
        result = criterion.loss(outputs, [objects], (96, 96))
    assert outputs[0].dtype == torch.bfloat16
    expected = criterion.loss(tuple(output.float() for output in outputs), [objects], (96, 96))
    assert all(torch.equal(result[key], expected[key]) for key in expected)
    assert result["loss"].dtype == torch.float32


def test_configuration() -> None:
    config = RetinaNetConfig(**TINY)
    assert RetinaNetConfig.model_validate_json(config.model_dump_json()) == config
    assert (config.timesteps, config.in_channels) == (2, 3)
    assert tiny(connection="ann").timesteps == 1
    with pytest.raises(ValidationError, match="set num_classes instead"):
        RetinaNetConfig(backbone=SGResNetConfig(num_classes=80))
    with pytest.raises(ValidationError, match="taps=5, but the backbone has 4 stages"):
        RetinaNetConfig(taps=5)
    with pytest.raises(ValidationError, match="must divide the 128 channels"):
        RetinaNetConfig(backbone=SGResNetConfig(asd_channel_reduction=256))
    with pytest.raises(ValidationError, match="must not exceed positive_iou"):
        RetinaCriterionConfig(negative_iou=0.6)
    with pytest.raises(ValidationError):
        RetinaNetConfig(extra_levels=1)


def test_outputs_that_do_not_fit_are_refused() -> None:
    model = tiny()
    outputs = model(scene()[0])
    criterion = criterion_of(model)
    with pytest.raises(ValueError, match="outputs: level 0 has shape"):
        criterion.loss(outputs, [NO_OBJECTS], (128, 128))
    with pytest.raises(ValueError, match="one entry for each of 1 images, found 2"):
        criterion.loss(outputs, [NO_OBJECTS] * 2, (96, 96))
