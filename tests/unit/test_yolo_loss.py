"""The YOLO criterion's loss: assignment against a literal reference, its three parts, gradients, odd batches."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchvision.ops import complete_box_iou, complete_box_iou_loss

from spikefleet_models.detection import Objects
from spikefleet_models.spike_yolo.config import REG_MAX, YoloCriterionConfig
from spikefleet_models.spike_yolo.decode import (
    AnchorPoints,
    anchor_points,
    boxes_to_distances,
    distances_to_boxes,
    expected_distances,
    split_outputs,
)
from spikefleet_models.spike_yolo.loss import YoloCriterion, assign, distribution_focal_loss

K = 3
SIZE = (64, 96)
STRIDES = (8, 16, 32)
NO_OBJECTS = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def grids(strides: Sequence[int] = STRIDES) -> list[tuple[int, int]]:
    return [(SIZE[0] // stride, SIZE[1] // stride) for stride in strides]


def random_objects(count: int, smallest: float = 4.0) -> Objects:
    corner = torch.rand(count, 2) * torch.tensor([SIZE[1] - 24, SIZE[0] - 24])
    side = smallest + torch.rand(count, 2) * 30
    return Objects(torch.cat((corner, corner + side), dim=1), torch.randint(0, K, (count,)))


def random_outputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, 4 * REG_MAX + K, *grid, dtype=dtype, requires_grad=True) for grid in grids(STRIDES))


def perfect_outputs(objects: Objects, batch: int = 1) -> tuple[Tensor, ...]:
    """Every point inside a box predicts the smallest box it lies in, exactly; the others a box and no class."""
    anchors = anchor_points(grids(), STRIDES, torch.zeros(()))
    areas = (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1)
    distances = torch.full((len(anchors.points), 4), 1.5)
    logits = torch.full((len(anchors.points), K), -20.0)
    for index in areas.argsort(descending=True).tolist():
        own = boxes_to_distances(objects.boxes[index].expand(len(anchors.points), 4), anchors)
        inside = (own > 0).all(1) & (own < REG_MAX - 1.1).all(1)
        distances[inside] = own[inside]
        logits[inside] = torch.where(torch.arange(K) == objects.labels[index], 20.0, -20.0)
    left = distances.floor().long().unsqueeze(-1)
    fraction = (distances - distances.floor()).unsqueeze(-1)
    probabilities = torch.zeros(*distances.shape, REG_MAX).scatter_(-1, left, 1 - fraction)
    probabilities.scatter_(-1, left + 1, fraction)
    merged = torch.cat(((probabilities + 1e-12).log().flatten(1), logits), dim=1).t().expand(batch, -1, -1)
    sizes = [rows * columns for rows, columns in grids()]
    return tuple(
        level.unflatten(2, grid).clone().requires_grad_()
        for level, grid in zip(merged.split(sizes, dim=2), grids(), strict=True)
    )


def literal_assignment(
    boxes: Tensor, scores: Tensor, objects: Objects, anchors: AnchorPoints, config: YoloCriterionConfig
) -> tuple[Tensor, Tensor]:
    """Owner [A] and target score [A] of one picture, by loops over anchors and objects."""
    A, N = len(boxes), len(objects.labels)
    u = [[0.0] * A for _ in range(N)]
    t = [[0.0] * A for _ in range(N)]
    taken: list[list[int]] = []
    for n in range(N):
        x1, y1, x2, y2 = objects.boxes[n].tolist()
        candidates = []
        for a in range(A):
            x, y = anchors.points[a].tolist()
            if x1 < x < x2 and y1 < y < y2:
                u[n][a] = max(0.0, complete_box_iou(boxes[a : a + 1], objects.boxes[n : n + 1]).item())
                t[n][a] = scores[a, objects.labels[n]].item() ** config.alpha * u[n][a] ** config.beta
                candidates.append(a)
        taken.append(sorted(candidates, key=lambda a: -t[n][a])[: config.topk])
    owner = torch.full((A,), -1)
    for a in range(A):
        owners = [n for n in range(N) if a in taken[n]]
        if owners:
            owner[a] = max(owners, key=lambda n: u[n][a])
    target = torch.zeros(A, dtype=torch.float64)
    for n in range(N):
        own = [a for a in range(A) if owner[a] == n]
        for a in own:
            largest = max(t[n][b] for b in own)
            target[a] = t[n][a] / largest * max(u[n][b] for b in own) if largest else 0.0
    return owner, target


@pytest.mark.parametrize("seed", range(4))
def test_assignment_is_the_literal_one(seed: int) -> None:
    torch.manual_seed(seed)
    objects = [random_objects(count) for count in (0, 1, 12)]
    config = YoloCriterionConfig(topk=[10, 3, 1, 200][seed])
    bins, logits = split_outputs(random_outputs(3, torch.float64), K)
    anchors = anchor_points(grids(), STRIDES, logits)
    boxes, scores = distances_to_boxes(expected_distances(bins), anchors).detach(), logits.sigmoid().detach()
    result = assign(boxes, scores, objects, anchors, config)
    for index, entry in enumerate(objects):
        entry = Objects(entry.boxes.double(), entry.labels)
        owner, target = literal_assignment(boxes[index], scores[index], entry, anchors, config)
        # A candidate of alignment 0 is no more than background; which of equal ones is taken does not matter.
        matters = target > 0
        assert matters.sum() == result.scores[index].sum(1).gt(0).sum()
        assert torch.equal(result.owner[index][matters], owner[matters])
        torch.testing.assert_close(result.scores[index].sum(1), target)
        assert torch.equal(result.scores[index].argmax(1)[matters], entry.labels[owner[matters]])
        assert torch.equal(result.boxes[index][matters], entry.boxes[owner[matters]])
    assert (result.owner[0] == -1).all()
    assert result.scores[2].any()


def test_a_shared_point_goes_to_the_better_box() -> None:
    anchors = anchor_points([(4, 4)], [8], torch.zeros(()))
    objects = Objects(torch.tensor([[0.0, 0, 32, 32], [10, 10, 22, 22]]), torch.tensor([0, 1]))
    small = objects.boxes[1].expand(1, 16, 4)
    owner = assign(small, torch.full((1, 16, K), 0.5), [objects], anchors, YoloCriterionConfig(topk=16)).owner[0]
    inside = ((anchors.points > 10) & (anchors.points < 22)).all(1)
    assert (owner[inside] == 1).all()
    assert (owner[~inside] == 0).all()


def test_tiny_objects_are_matched_only_on_request() -> None:
    """No point lies in the box between the centres at 4 and 12; that of the next level, at 8, is nearer but coarse."""
    objects = Objects(torch.tensor([[5.0, 5, 8, 8], [40, 40, 40, 40]]), torch.tensor([2, 1]))
    outputs = random_outputs(1)
    bins, logits = split_outputs(outputs, K)
    anchors = anchor_points(grids(), STRIDES, logits)
    boxes, scores = distances_to_boxes(expected_distances(bins), anchors), logits.sigmoid()
    assert (assign(boxes, scores, [objects], anchors, YoloCriterionConfig()).owner == -1).all()
    owner = assign(boxes, scores, [objects], anchors, YoloCriterionConfig(match_small=True)).owner[0]
    assert (owner >= 0).nonzero().tolist() == [[0]]  # the box without area stays nobody's

    criterion = YoloCriterion(YoloCriterionConfig(match_small=True), K, STRIDES)
    leaves = [output.detach().mul(0.01).requires_grad_() for output in outputs]
    optimizer = torch.optim.Adam(leaves, lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        criterion.loss(tuple(leaves), [Objects(objects.boxes[:1], objects.labels[:1])], SIZE)["loss"].backward()
        optimizer.step()
    best = criterion.detect(tuple(leaves), SIZE)[0]
    assert best.labels[0] == 2
    # The box ends at (8, 8) and holds the point at (4, 4).
    torch.testing.assert_close(best.boxes[0], torch.tensor([4.0, 4, 8, 8]), atol=0.5, rtol=0)


def test_dfl_by_hand() -> None:
    bins = torch.zeros(1, 4, REG_MAX)
    bins[0, :, 3] = torch.log(torch.tensor(9.0))  # p_3 = 9/24, the others 1/24
    distances = torch.tensor([[3.0, 3.25, 2.5, 99.0]])
    p, q = -torch.log(torch.tensor([9 / 24, 1 / 24]))
    by_hand = (p + (0.75 * p + 0.25 * q) + (0.5 * q + 0.5 * p) + q) / 4
    torch.testing.assert_close(distribution_focal_loss(bins, distances), by_hand[None])


def test_loss_is_the_sum_of_its_definitions() -> None:
    """Every part once more, from the assignment, one positive anchor at a time."""
    torch.manual_seed(0)
    outputs, objects = random_outputs(2, torch.float64), [random_objects(3), random_objects(5)]
    config = YoloCriterionConfig(box_gain=2.0, cls_gain=3.0, dfl_gain=5.0)
    result = YoloCriterion(config, K, STRIDES).loss(outputs, objects, SIZE)
    bins, logits = split_outputs(outputs, K)
    anchors = anchor_points(grids(), STRIDES, logits)
    boxes = distances_to_boxes(expected_distances(bins), anchors)
    target = assign(boxes, logits.sigmoid(), objects, anchors, config)
    total = max(1.0, target.scores.sum().item())
    box, dfl = 0.0, 0.0
    for b, a in (target.owner >= 0).nonzero().tolist():
        own, weight = objects[b].boxes[target.owner[b, a]].double(), target.scores[b, a].sum().item()
        box += weight * (1 - complete_box_iou(boxes[b, a : a + 1], own[None]).item())
        cells = (anchors.points[a].repeat(2) - own).abs() / anchors.strides[a]
        for side, cell in enumerate(cells.clamp(max=REG_MAX - 1.01).tolist()):
            log_p = bins[b, a, side].log_softmax(0).tolist()
            dfl -= weight / 4 * ((int(cell) + 1 - cell) * log_p[int(cell)] + (cell - int(cell)) * log_p[int(cell) + 1])
    p, y = logits.sigmoid(), target.scores
    cls = -(y * p.log() + (1 - y) * (1 - p).log()).sum().item()
    assert result["box"].item() == pytest.approx(2 * box / total, rel=1e-6)
    assert result["dfl"].item() == pytest.approx(5 * dfl / total, rel=1e-6)
    assert result["cls"].item() == pytest.approx(3 * cls / total, rel=1e-6)
    assert result["loss"].item() == pytest.approx(sum(result[key].item() for key in ("box", "cls", "dfl")))


def test_gradient_by_finite_differences() -> None:
    """The targets and CIoU's trade-off are constants of the gradient, so they are frozen in the differences too."""
    torch.manual_seed(1)
    objects, size, strides = Objects(torch.tensor([[3.0, 2, 29, 27]]), torch.tensor([1])), (32, 32), (16,)
    output = torch.randn(1, 4 * REG_MAX + K, 2, 2, dtype=torch.float64, requires_grad=True)
    anchors = anchor_points([(2, 2)], strides, output)
    YoloCriterion(YoloCriterionConfig(), K, strides).loss((output,), [objects], size)["loss"].backward()

    def read(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bins, logits = split_outputs((x,), K)
        return bins, logits, distances_to_boxes(expected_distances(bins), anchors)

    _, logits, boxes = read(output.detach())
    target = assign(boxes, logits.sigmoid(), [objects], anchors, YoloCriterionConfig())
    weights = target.scores.sum(-1)[0]
    total = max(1.0, weights.sum().item())
    own = target.boxes[0]

    def shape_term(boxes: Tensor) -> Tensor:
        angle = [torch.atan((b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1])) for b in (own, boxes[0])]
        return 4 / torch.pi**2 * (angle[0] - angle[1]) ** 2

    loss_at = complete_box_iou_loss(boxes[0], own)
    v_at = shape_term(boxes)
    iou = torch.stack([intersection_over_union(a, b) for a, b in zip(boxes[0], own, strict=True)])
    trade_off = v_at / (1 - iou + v_at + 1e-7)

    def value(x: Tensor) -> Tensor:
        bins, logits, boxes = read(x)
        v = shape_term(boxes)
        moving = v / (1 - torch.stack([intersection_over_union(a, b) for a, b in zip(boxes[0], own, strict=True)]) + v)
        ciou_loss = complete_box_iou_loss(boxes[0], own) - moving * v + trade_off * v
        dfl = distribution_focal_loss(bins[0], boxes_to_distances(own, anchors))
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.scores, reduction="sum")
        return (7.5 * (weights * ciou_loss).sum() + 1.5 * (weights * dfl).sum() + 0.5 * bce) / total

    assert loss_at.isfinite().all()
    assert (weights > 0).any()
    numeric = torch.zeros_like(output)
    flat = output.detach()
    for index in range(flat.numel()):
        step = torch.zeros(flat.numel(), dtype=torch.float64)
        step[index] = 1e-5
        step = step.view_as(flat)
        numeric.view(-1)[index] = (value(flat + step) - value(flat - step)) / 2e-5
    assert output.grad is not None
    torch.testing.assert_close(output.grad, numeric, rtol=1e-4, atol=1e-6)


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_min(0)
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - sides.prod()
    return sides.prod() / (union + 1e-7)


def test_perfect_predictions_and_controls() -> None:
    objects = Objects(torch.tensor([[4.0, 6, 37, 41], [50, 10, 90, 60]]), torch.tensor([0, 2]))
    # Points beyond the best 10 would have to predict background.
    criterion = YoloCriterion(YoloCriterionConfig(topk=1000), K, STRIDES)
    outputs = perfect_outputs(objects)
    perfect = criterion.loss(outputs, [objects], SIZE)
    assert perfect["box"] < 1e-3
    assert perfect["cls"] < 1e-3
    # Two neighbouring bins share the probability, so their entropy is left.
    assert perfect["dfl"] < 1.5 * 0.7

    shifted = criterion.loss(outputs, [Objects(objects.boxes + 4, objects.labels)], SIZE)
    assert shifted["box"] > 0.5
    relabelled = criterion.loss(outputs, [Objects(objects.boxes, 2 - objects.labels)], SIZE)
    assert relabelled["cls"] > 1.0


def test_loss_does_not_grow_with_the_batch() -> None:
    objects = Objects(torch.tensor([[4.0, 6, 37, 41], [50, 10, 90, 60]]), torch.tensor([0, 2]))
    criterion = YoloCriterion(YoloCriterionConfig(), K, STRIDES)
    outputs = random_outputs(1)
    once = criterion.loss(outputs, [objects], SIZE)["loss"]
    four = criterion.loss(tuple(output.repeat(4, 1, 1, 1) for output in outputs), [objects] * 4, SIZE)["loss"]
    # Target scores that sum to less than 1 are divided by 1.
    assert four.item() == pytest.approx(once.item(), rel=1e-4) or once < four <= 4 * once
    perfect = perfect_outputs(objects)
    once = criterion.loss(perfect, [objects], SIZE)["dfl"]
    four = criterion.loss(tuple(output.repeat(4, 1, 1, 1) for output in perfect), [objects] * 4, SIZE)["dfl"]
    assert four.item() == pytest.approx(once.item(), rel=1e-4)


@pytest.mark.parametrize("counts", [(0, 0), (0, 4), (3, 0)])
def test_pictures_without_objects(counts: tuple[int, int]) -> None:
    torch.manual_seed(2)
    outputs = random_outputs(2)
    objects = [random_objects(count, smallest=20) for count in counts]
    result = YoloCriterion(YoloCriterionConfig(), K, STRIDES).loss(outputs, objects, SIZE)
    result["loss"].backward()
    assert all(part.isfinite() for part in result.values())
    assert (result["box"] > 0) == any(counts)
    for output in outputs:
        assert output.grad is not None
        assert output.grad.isfinite().all()
        assert output.grad[:, 4 * REG_MAX :].any()


def test_fp32_inside_autocast() -> None:
    torch.manual_seed(3)
    outputs = tuple(output.detach().bfloat16() for output in random_outputs(2))
    objects = [random_objects(4), random_objects(2)]
    criterion = YoloCriterion(YoloCriterionConfig(), K, STRIDES)
    expected = criterion.loss(tuple(output.float() for output in outputs), objects, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = criterion.loss(outputs, objects, SIZE)
    assert all(part.dtype == torch.float32 for part in result.values())
    assert all(torch.equal(result[key], expected[key]) for key in expected)


def test_saturated_outputs_stay_finite() -> None:
    outputs = copy.deepcopy([output.detach() for output in random_outputs(1)])
    for output in outputs:
        output[:, : 4 * REG_MAX] = 0.0
        output[:, 0 : 4 * REG_MAX : REG_MAX] = 1e4  # all of bin 0: boxes without width and height
        output[:, 4 * REG_MAX :] *= 1e4
        output.requires_grad_()
    result = YoloCriterion(YoloCriterionConfig(), K, STRIDES).loss(tuple(outputs), [random_objects(4, 20)], SIZE)
    result["loss"].backward()
    assert result["loss"].isfinite()
    assert all(output.grad is not None and output.grad.isfinite().all() for output in outputs)


def test_refusals() -> None:
    criterion = YoloCriterion(YoloCriterionConfig(), K, STRIDES)
    outputs = random_outputs(1)
    with pytest.raises(ValueError, match=r"one level for each stride of .*, found 2 levels"):
        criterion.loss(outputs[:2], [NO_OBJECTS], SIZE)
    with pytest.raises(ValueError, match="outputs: level 0 has shape"):
        criterion.loss(outputs, [NO_OBJECTS], (128, 128))
    with pytest.raises(ValueError, match="one entry for each of 1 images, found 2"):
        criterion.loss(outputs, [NO_OBJECTS] * 2, SIZE)
    with pytest.raises(ValueError, match=r"labels range from 3 to 3, expected 0 to 2"):
        criterion.loss(outputs, [Objects(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([3]))], SIZE)
    with pytest.raises(ValueError, match=r"expected \[N, 4\]"):
        criterion.loss(outputs, [Objects(torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64))], SIZE)
