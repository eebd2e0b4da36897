"""The YOLO criterion's detections: decoded boxes by hand, thresholds, suppression, order."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from spikefleet_models.detection import suppress
from spikefleet_models.spike_yolo.config import REG_MAX, YoloCriterionConfig
from spikefleet_models.spike_yolo.decode import (
    anchor_points,
    boxes_to_distances,
    distances_to_boxes,
    expected_distances,
    split_outputs,
)
from spikefleet_models.spike_yolo.loss import YoloCriterion

K = 3


def empty_level(rows: int, columns: int) -> Tensor:
    """Nothing found, and boxes of all-equal bins: 7.5 cells to each side."""
    level = torch.zeros(1, 4 * REG_MAX + K, rows, columns)
    level[:, 4 * REG_MAX :] = -20.0
    return level


def put(level: Tensor, row: int, column: int, distances: tuple[int, int, int, int], **scores: float) -> None:
    """One cell with whole distances (l, t, r, b) in cells; scores by `class0`, `class1`, ..."""
    for side, distance in enumerate(distances):
        level[0, side * REG_MAX : (side + 1) * REG_MAX, row, column] = 0.0
        level[0, side * REG_MAX + distance, row, column] = 100.0
    for name, score in scores.items():
        level[0, 4 * REG_MAX + int(name[-1]), row, column] = torch.tensor(score).logit()


def test_anchor_points_are_cell_centres() -> None:
    anchors = anchor_points([(2, 3), (1, 2)], (8, 16), torch.zeros(()))
    expected = [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert anchors.points.tolist() == expected
    assert anchors.strides.squeeze(1).tolist() == [8] * 6 + [16] * 2


def test_boxes_and_distances_are_inverse() -> None:
    torch.manual_seed(0)
    anchors = anchor_points([(4, 5), (2, 3)], (7, 14), torch.zeros((), dtype=torch.float64))
    distances = torch.rand(2, 26, 4, dtype=torch.float64) * 15
    torch.testing.assert_close(boxes_to_distances(distances_to_boxes(distances, anchors), anchors), distances)


def test_expectation_of_the_bins() -> None:
    bins = torch.zeros(3, REG_MAX)
    bins[1, 15] = 100.0
    bins[2, [3, 4]] = 100.0
    torch.testing.assert_close(expected_distances(bins), torch.tensor([7.5, 15.0, 3.5]))


def test_channels_are_bins_then_classes() -> None:
    outputs = tuple(torch.randn(2, 4 * REG_MAX + K, *grid) for grid in ((2, 3), (1, 2)))
    bins, logits = split_outputs(outputs, K)
    assert torch.equal(bins[1, 4, 2], outputs[0][1, 2 * REG_MAX : 3 * REG_MAX, 1, 1])
    assert torch.equal(logits[0, 7], outputs[1][0, 4 * REG_MAX :, 0, 1])


def test_one_detection_by_hand() -> None:
    levels = (empty_level(4, 6), empty_level(2, 3))
    put(levels[0], 1, 2, (1, 0, 2, 3), class1=0.9)
    put(levels[1], 0, 1, (1, 1, 1, 1), class0=0.6)
    found = YoloCriterion(YoloCriterionConfig(), K, (8, 16)).detect(levels, (32, 48))[0]
    assert found.labels.tolist() == [1, 0]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.6]))
    # Cell (1, 2) of stride 8 has its centre at x = 20, y = 12; cell (0, 1) of stride 16 at x = 24, y = 8.
    expected = torch.tensor([[12.0, 12, 36, 36], [8, -8, 40, 24]])
    torch.testing.assert_close(found.boxes, expected, atol=1e-2, rtol=0)


def test_multi_label() -> None:
    level = empty_level(2, 2)
    put(level, 0, 0, (0, 0, 1, 1), class0=0.5, class2=0.7)
    several = YoloCriterion(YoloCriterionConfig(), K, (8,)).detect((level,), (16, 16))[0]
    assert several.labels.tolist() == [2, 0]
    assert torch.equal(several.boxes[0], several.boxes[1])
    best = YoloCriterion(YoloCriterionConfig(multi_label=False), K, (8,)).detect((level,), (16, 16))[0]
    assert best.labels.tolist() == [2]


def test_suppression_is_within_a_class() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60]])
    scores, labels = torch.tensor([0.8, 0.9, 0.7, 0.6]), torch.tensor([0, 0, 1, 0])
    kept = suppress(boxes, scores, labels, iou=0.7, max_candidates=10, max_detections=10)
    assert kept.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert kept.labels.tolist() == [0, 1, 0]
    assert len(suppress(boxes, scores, labels, iou=0.95, max_candidates=10, max_detections=10).scores) == 4
    assert suppress(boxes, scores, labels, iou=0.7, max_candidates=2, max_detections=9).labels.tolist() == [0]
    assert suppress(boxes, scores, labels, iou=0.7, max_candidates=9, max_detections=2).labels.tolist() == [0, 1]


def test_negative_coordinates_do_not_mix_classes() -> None:
    """torchvision shifts class 1 by max + 1 = 21; unguarded, its box would lie exactly on the box of class 0."""
    boxes = torch.tensor([[10.0, 10, 20, 20], [-11, -11, -1, -1]])
    kept = suppress(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), iou=0.5, max_candidates=9, max_detections=9)
    assert kept.labels.tolist() == [0, 1]


@pytest.mark.parametrize("count", [40, 3000])
def test_equal_scores_keep_their_order(count: int) -> None:
    """Both ways torchvision has of suppressing, by number of boxes."""
    x = torch.arange(count) * 20.0
    boxes = torch.stack((x, x, x + 10, x + 10), dim=1)
    scores = torch.full((count,), 0.5)
    scores[-1] = 0.9
    labels = torch.arange(count) % 7
    kept = suppress(boxes, scores, labels, iou=0.5, max_candidates=count, max_detections=count)
    assert torch.equal(kept.boxes, torch.cat((boxes[-1:], boxes[:-1])))


def test_random_outputs_hold_the_promises() -> None:
    torch.manual_seed(0)
    levels = tuple(torch.randn(3, 4 * REG_MAX + K, side, side).half() for side in (16, 8, 4))
    config = YoloCriterionConfig(score_threshold=0.2, nms_iou=0.5, max_detections=50)
    results = YoloCriterion(config, K, (8, 16, 32)).detect(levels, (128, 128))
    assert len(results) == 3
    for boxes, scores, labels in results:
        assert 0 < len(scores) <= 50
        assert boxes.dtype == scores.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert (scores > 0.2).all()
        assert (scores.diff() <= 0).all()
        overlap = box_iou(boxes, boxes).fill_diagonal_(0)
        assert (overlap[labels[:, None] == labels] <= 0.5 + 1e-3).all()
        assert (overlap > 0.5).any()  # across classes


def test_nothing_found() -> None:
    found = YoloCriterion(YoloCriterionConfig(), K, (8,)).detect((empty_level(2, 2),), (16, 16))[0]
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)
