"""The metric of both forms is measured where it is defined."""

from pathlib import Path

import numpy as np
import pytest

from spikefleet.certificates.metric_leg import MetricLeg, compare_metrics
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.tasks import build_task
from spikefleet_models.families import build_model
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.writer import StoreWriter
from unit.test_detection_targets import TABLE, columns


def measured(out: Path, with_object: int | None) -> MetricLeg:
    """On 4 of 6 images of 64 x 64, or as many as are needed; one has an object."""
    boxes = [[[8.0, 8.0, 40.0, 40.0]] if index == with_object else [] for index in range(6)]
    image = ImageFormat(encoding="raw", shape=(3, 64, 64))
    with StoreWriter(out, source="test", class_names="ab", image=image, options={}, category_ids=TABLE) as writer:
        images = np.random.default_rng(0).integers(0, 256, (6, 3, 64, 64), np.uint8)
        writer.write_images("val", images, columns([(64, 64)] * 6, boxes))
        writer.commit()
    store = Store.open(out)
    overrides = ["model.num_classes=2", "data.transform.size=64", "train.eval_batch=2"]
    config = load_config("scenes_spike_yolo", parse_overrides(overrides))
    network = build_model(config.model).eval()
    loader = BatchLoader(store.split("val"), config.data.transform, train=False)
    task = build_task(config, DataSummary.of(store.manifest))
    return compare_metrics(network, network, task, config, loader, 4)


@pytest.mark.parametrize(("with_object", "images"), [(0, 4), (3, 4), (5, 6)])
def test_more_images_are_measured_where_the_first_ones_have_no_object(
    with_object: int, images: int, tmp_path: Path
) -> None:
    leg = measured(tmp_path / "store", with_object)
    assert leg.images == images
    assert leg.passed


def test_a_split_without_objects_has_no_metric(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one object, found none in 6 images"):
        measured(tmp_path / "store", None)
