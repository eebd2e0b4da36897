"""Trainings on events: the same bits for any loader, layout and resume, in this process and on Ray's workers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from spikefleet.cluster.ray_train import train_on_ray
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.loop import Outcome, train
from spikefleet.training.splits import prepare_parts
from spikefleet_pipelines.store.reader import Store
from support.event_stores import boxed_store, labelled_store
from support.events import KeptEvents
from support.ranks import run_undisturbed
from support.snapshots import assert_same_end, cut, differences, end_of

pytestmark = pytest.mark.xdist_group("ray")

CLASSIFIER = """
task: classification
model: {family: sg_resnet, stages: [1], width: 0.125, in_channels: 2, num_classes: 4, timesteps: 3, decoder: rate}
data:
  source: saccades
  transform:
    kind: events
    augmentation: {polarity_swap: 0.3, shift: 0.05, event_drop: true}
    keep_slices: 2
    keep_fill: zero
train: {epochs: 2, global_batch: 8, eval_batch: 16}
optim: {lr: 0.1}
checkpoint: {every_steps: 1, keep_last: 9}
tracking: {every_steps: 1}
"""


def config(folder: Path, *overrides: str) -> Config:
    path = folder / "classifier.yaml"
    path.write_text(CLASSIFIER)
    return load_config(str(path), parse_overrides(overrides))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return labelled_store(tmp_path_factory.mktemp("s") / "store", "saccades", (12, 16), [150] * 24, classes=4)


def trained(config: Config, store: Store, run_dir: Path) -> tuple[Outcome, dict[int, float]]:
    sink = KeptEvents()
    outcome = train(config, store, run_dir, ProcessGroup.single(), sink)
    return outcome, sink.losses


def test_loaders_and_where_events_are_counted_change_no_bit(store: Store, tmp_path: Path) -> None:
    whole, losses = trained(config(tmp_path), store, tmp_path / "whole")
    assert sorted(losses) == list(range(1, 7))
    assert all(map(math.isfinite, losses.values()))
    for name, override in (("processes", "data.loader_processes=2"), ("device", "data.transform.bin_on=device")):
        outcome, found = trained(config(tmp_path, override), store, tmp_path / name)
        assert found == losses
        assert outcome.validation == whole.validation
        assert differences(end_of(tmp_path / name), end_of(tmp_path / "whole")) == []
    _, other = trained(config(tmp_path, "data.transform.keep_slices=null"), store, tmp_path / "other")
    assert other != losses
    report = json.loads((tmp_path / "whole" / "report" / "evaluation.json").read_text())
    assert report["samples"] == 24
    assert len(report["confusion"]) == 4
    for plot in ("training_batch", "predictions", "confusion"):
        assert (tmp_path / "whole" / "report" / f"{plot}.png").stat().st_size > 5000


def test_a_resumed_run_equals_the_uninterrupted_one(store: Store, tmp_path: Path) -> None:
    _, losses = trained(config(tmp_path), store, tmp_path / "whole")
    for step in (2, 3):
        cut(tmp_path / "whole", step, tmp_path / f"cut-{step}")
        _, tail = trained(config(tmp_path), store, tmp_path / f"cut-{step}")
        assert tail == {number: loss for number, loss in losses.items() if number > step}
        assert_same_end(tmp_path / f"cut-{step}", tmp_path / "whole")


def test_layouts_and_micro_batches_give_the_same_network(store: Store, tmp_path: Path) -> None:
    _, losses = trained(config(tmp_path), store, tmp_path / "plain")
    _, last = trained(config(tmp_path, "train.channels_last=true"), store, tmp_path / "channels-last")
    assert last == pytest.approx(losses, rel=1e-4)
    _, parts = trained(config(tmp_path, "train.accumulate=2"), store, tmp_path / "parts")
    assert sorted(parts) == sorted(losses)


def test_dropped_slices_are_fewer_steps(store: Store, tmp_path: Path) -> None:
    outcome, losses = trained(config(tmp_path, "data.transform.keep_fill=drop"), store, tmp_path / "run")
    assert all(map(math.isfinite, losses.values()))
    assert 0 <= outcome.test["top1"] <= 1


def test_two_workers_of_ray_train_on_events(ray_on_two_cpus: None, store: Store, tmp_path: Path) -> None:
    """They resume what two ranks began that Ray knows nothing of, and end as those do."""
    here = config(tmp_path, "cluster.workers=2")
    whole = run_undisturbed(here, Path(store.absolute_location), tmp_path / "whole")
    assert sorted(whole.losses) == list(range(1, 7))
    cut(tmp_path / "whole", 4, tmp_path / "ray")
    sink = KeptEvents()
    outcome = train_on_ray(here, store, tmp_path / "ray", sink)
    assert sink.losses == {step: loss for step, loss in whole.losses.items() if step > 4}
    assert_same_end(tmp_path / "ray", tmp_path / "whole")
    assert outcome.test.keys() >= {"top1"}
    over_time = json.loads((tmp_path / "ray" / "report" / "evaluation.json").read_text())["over_time"]["top1"]
    assert len(over_time) == 3
    assert over_time[-1] == pytest.approx(outcome.test["top1"])  # of the samples of both ranks


def test_a_detector_trains_on_label_times(tmp_path: Path) -> None:
    store = boxed_store(tmp_path / "store", "saccade_scenes", (56, 60), 12)
    overrides = ["train.epochs=1", "train.global_batch=8", "cluster.workers=0", "optim.warmup_epochs=0.5"]
    overrides += ["model.num_classes=2", "tracking.every_steps=1", "data.transform.zoom=0.5", "model.timesteps=2"]
    here = load_config("saccade_scenes_spike_yolo", parse_overrides(overrides))
    outcome, losses = trained(here, store, tmp_path / "run")
    assert sorted(losses) == [1, 2, 3]
    assert all(map(math.isfinite, losses.values()))
    assert {"map50_95", "map50"} <= outcome.test.keys()
    report = json.loads((tmp_path / "run" / "report" / "evaluation.json").read_text())
    assert [one["name"] for one in report["classes"]] == ["small", "large"]
    assert [one["objects"] for one in report["classes"]] == [12, 12]  # those beyond the sensor are none
    for plot in ("training_batch", "predictions", "confusion"):
        assert (tmp_path / "run" / "report" / f"{plot}.png").stat().st_size > 5000


def test_channels_and_classes_must_fit(store: Store, tmp_path: Path) -> None:
    representation = ["data.transform.representation.kind=histogram", "data.transform.representation.bins=3"]
    six, ten = config(tmp_path, *representation), config(tmp_path, "model.num_classes=10")
    with pytest.raises(UserError, match=r"in_channels=2, but the frames of the events have 6 channels"):
        prepare_parts(six, store, ProcessGroup.single())
    with pytest.raises(UserError, match=r"model.num_classes=10, but the data has 4 classes"):
        prepare_parts(ten, store, ProcessGroup.single())
    with pytest.raises(UserError, match=r"data.source=digits has images, .* set data.transform.kind=image"):
        config(tmp_path, "data.source=digits")


def test_a_summary_knows_sensor_and_orientation(store: Store, tmp_path: Path) -> None:
    summary = DataSummary.of(store.manifest)
    assert (summary.sensor, summary.orientation, summary.image_shape) == ((12, 16), "as-read", None)
    assert summary.input_shape(config(tmp_path).transform) == (2, 12, 16)
    summary.write(tmp_path)
    assert DataSummary.read(tmp_path) == summary
    plain = json.loads((tmp_path / "data.json").read_text())
    for name in ("sensor", "orientation"):
        del plain[name]
    (tmp_path / "data.json").write_text(json.dumps(plain))
    assert DataSummary.read(tmp_path).sensor is None  # as those of earlier versions are read
