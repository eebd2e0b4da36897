"""The drift report on real stores: planted drift is found, none where there is none, and what is missing is said."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from spikefleet.certificates.drift_reference import REFERENCE, DriftReference
from spikefleet.certificates.energy_card import REGISTERED_CONSTANTS
from spikefleet.certificates.reference_measurement import reference_of, weights_digest
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.retraining.drift import DriftReport, compare, measure_drift
from spikefleet.retraining.drift_plots import draw_drift
from spikefleet.runs.run_dir import Run
from spikefleet.tasks import build_task
from spikefleet.tasks.coco_metrics import found_objects, ground_truth
from spikefleet.training.checkpoints import best_network, load_checkpoint
from spikefleet_models.energy import energy_card
from spikefleet_models.families import build_model
from spikefleet_models.health import SpikeMonitor
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.writer import StoreWriter
from unit.test_detection_targets import TABLE, black_png, columns, make_encoded

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format_1" / "run"
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Champion:
    """A trained network and the images it was trained on."""

    network: nn.Module
    config: Config
    store: Store
    folder: Path

    def store_of(self, images: Pixels, labels: NDArray[np.int64], names: tuple[str, ...] = ()) -> Store:
        """A store of these images."""
        out = self.folder / f"store-{len(list(self.folder.iterdir()))}"
        classes = names or self.store.manifest.class_names
        image = ImageFormat(encoding="raw", shape=images.shape[1:])
        with StoreWriter(out, source="digits", class_names=classes, image=image, options={}) as writer:
            writer.write_images("train", images, labels)
            writer.commit()
        return Store.open(out)

    def drift(self, after: Store, before: Store | DriftReference | DataSummary | None = None) -> DriftReport:
        """The report of a part of the images, for speed."""
        return measure_drift(
            before or self.store, after, "train", self.network, self.config, network_images=64, energy_images=8
        )

    @property
    def images(self) -> Pixels:
        rows = self.store.split("train")
        return rows.gather(np.arange(len(rows)))

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.store.split("train").labels


@pytest.fixture(scope="module")
def champion(stores_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Champion:
    run = Run(FIXTURE)
    checkpoint = run.checkpoints.latest()
    assert checkpoint is not None
    snapshot = load_checkpoint(checkpoint)
    config = run.parse(snapshot.config, origin="the fixture")
    store = Store.open(stores_dir / "digits", verify=False)
    return Champion(best_network(snapshot, config.model), config, store, tmp_path_factory.mktemp("drift"))


@pytest.fixture(scope="module")
def before(champion: Champion) -> DriftReference:
    """What the champion was trained on."""
    return reference_of(champion.store, "train", champion.network, champion.config, network_images=64, energy_images=8)


def alarms(report: DriftReport) -> dict[str, str]:
    return {measure.name: measure.level for measure in report.alarms}


def test_the_same_data_has_not_drifted(champion: Champion) -> None:
    report = champion.drift(champion.store)
    assert report.level == "none"
    assert not report.alarms
    assert [measure.value for measure in report.measures] == [0.0] * len(report.measures)
    assert len(report.measures) == 8
    assert report.sentences()[0] == "the data is the same, to the bit"
    assert not report.missing


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.05])
def test_other_samples_of_the_same_data_have_not_drifted(
    champion: Champion, before: DriftReference, fraction: float
) -> None:
    kept = np.random.default_rng(1).random(len(champion.labels)) < fraction
    report = champion.drift(champion.store_of(champion.images[kept], champion.labels[kept]), before)
    assert not report.alarms
    if fraction == 0.05:
        assert any("with so few images" in sentence for sentence in report.sentences())


def darker(champion: Champion) -> Store:
    return champion.store_of((champion.images * 0.5).astype(np.uint8), champion.labels)


def larger(champion: Champion) -> Store:
    return champion.store_of(champion.images.repeat(2, axis=2).repeat(2, axis=3), champion.labels)


def fewer_threes(champion: Champion) -> Store:
    kept = (champion.labels != 3) | (np.random.default_rng(1).random(len(champion.labels)) < 0.2)
    return champion.store_of(champion.images[kept], champion.labels[kept])


def flatter(champion: Champion) -> Store:
    """The mean of each image stays, its contrast falls."""
    images = champion.images
    means = images.mean(axis=(1, 2, 3), keepdims=True)
    return champion.store_of((means + (images - means) * 0.7).round().astype(np.uint8), champion.labels)


def answered(champion: Champion) -> Store:
    """Images have the classes that the champion answers: it is always right, and as unsure as before."""
    loader = BatchLoader(champion.store.split("train"), champion.config.data.transform, train=False)
    plan = EvaluationPlan(samples=len(champion.labels), global_batch=256)
    with torch.no_grad():
        answers = [champion.network(batch.images).argmax(1) for batch in loader.epoch(plan, epoch=0)]
    labels = torch.cat(answers).numpy()
    labels[:10] = np.arange(10)  # a store has an image of each class
    return champion.store_of(champion.images, labels)


PLANTED: list[tuple[Callable[[Champion], Store], set[str], set[str]]] = [
    (darker, {"brightness", "contrast", "firing rates", "energy"}, {"class shares", "image width"}),
    (larger, {"image width", "image height"}, {"class shares", "brightness", "contrast"}),
    (fewer_threes, {"class shares"}, {"brightness", "contrast", "image width", "firing rates", "energy"}),
    (flatter, {"contrast"}, {"brightness", "class shares", "image width"}),
    (answered, {"calibration error"}, {"brightness", "contrast", "image width", "firing rates", "energy"}),
]


@pytest.mark.parametrize(("plant", "drifted", "still"), PLANTED, ids=[plant.__name__ for plant, *_ in PLANTED])
def test_planted_drift_alarms_and_nothing_else_does(
    champion: Champion,
    before: DriftReference,
    plant: Callable[[Champion], Store],
    drifted: set[str],
    still: set[str],
) -> None:
    report = champion.drift(plant(champion), before)
    found = alarms(report)
    assert drifted <= set(found), report.sentences()
    assert not still & set(found), report.sentences()
    levels = [{"strong": 0, "moderate": 1, "none": 2}[measure.level] for measure in report.measures]
    assert levels == sorted(levels), "worst first"
    sentences = report.sentences()
    assert sentences[: len(found)] == [measure.sentence for measure in report.alarms]
    assert all(sentence.startswith(("strong", "moderate")) for sentence in sentences[: len(found)])


def test_sentences_say_what_has_changed(champion: Champion, before: DriftReference) -> None:
    first = champion.drift(fewer_threes(champion), before).sentences()[0]
    assert "class shares" in first
    assert "'3' 10.1% to 2." in first
    assert "chi-square p < 0.001" in first
    dark = champion.drift(darker(champion), before)
    assert any(one.startswith("strong drift of brightness: 0.308 before, 0.153 after (PSI") for one in dark.sentences())
    assert dark.sentences()[-1].startswith("brightness, contrast and sizes are those of 1,000 of 1,295 images before")
    assert "| brightness | 0.308 | 0.153 |" in dark.markdown()
    assert "| stem.unit.neuron |" in dark.markdown()


def test_a_new_class_is_named_and_alarms(champion: Champion, before: DriftReference) -> None:
    """The champion has no output for it: its spikes are compared, its calibration is not."""
    labels = champion.labels.copy()
    labels[::4] = 10
    store = champion.store_of(champion.images, labels, names=(*champion.store.manifest.class_names, "a|b\n*"))
    report = champion.drift(store, before)
    assert alarms(report) == {"class shares": "strong"}
    assert report.sentences()[0] == "the classes are others: new: 'a|b\\n*'"
    assert any(one.startswith("the calibration cannot be measured: model.num_classes=10") for one in report.missing)
    assert "firing rates" in {measure.name for measure in report.measures}
    assert "a\\|b\\\\n\\*" in report.markdown()
    assert len({line.count(" | ") for line in report.markdown().splitlines() if line.startswith("| b")}) == 1


def test_classes_in_another_order_are_compared_by_name(champion: Champion, before: DriftReference) -> None:
    names = champion.store.manifest.class_names[::-1]
    report = champion.drift(champion.store_of(champion.images, 9 - champion.labels, names), before)
    shares = next(measure for measure in report.measures if measure.name == "class shares")
    assert shares.value == 0.0
    assert report.sentences()[0] == "the classes are others: their order changed"


def test_images_that_the_champion_does_not_take_are_compared_without_it(
    champion: Champion, before: DriftReference
) -> None:
    coloured = champion.images.repeat(3, axis=1)
    report = champion.drift(champion.store_of(coloured, champion.labels), before)
    assert not report.alarms
    assert not report.layers
    assert any("it takes 1 channel, and the images have 3" in one for one in report.missing)


def test_a_store_that_is_gone_leaves_names_and_sizes(champion: Champion) -> None:
    summary = DataSummary.of(champion.store.manifest)
    report = champion.drift(larger(champion), summary)
    assert not report.measures
    assert report.level == "none"
    assert report.sentences()[0] == "images are 16 x 16 with 1 channel now; they were 8 x 8 with 1 channel"
    assert any("is gone and its version has no reference.json" in one for one in report.missing)
    other = champion.drift(champion.store, replace(summary, class_names=("0", "1"), content_hash="0" * 64))
    assert other.changes == ("the classes are others: new: '2', '3', '4' and 5 more",)


def test_a_reference_stands_for_a_store_that_is_gone(
    champion: Champion, before: DriftReference, tmp_path: Path
) -> None:
    before.write(tmp_path)
    again = DriftReference.read(tmp_path)
    assert again == before
    assert (tmp_path / REFERENCE).stat().st_size < 30_000
    dark = darker(champion)
    assert champion.drift(dark, again) == champion.drift(dark, champion.store)


def test_a_reference_of_another_network_is_not_compared(champion: Champion, before: DriftReference) -> None:
    torch.manual_seed(1)
    other = replace(champion, network=build_model(champion.config.model).eval())
    report = other.drift(champion.store, before)
    assert not report.layers
    assert "firing rates, energy and calibration before are those of another network: not compared" in report.missing
    assert weights_digest(other.network) != weights_digest(champion.network)


def test_a_reference_of_another_split_is_said(champion: Champion) -> None:
    report = compare(reference_of(champion.store, "val"), reference_of(champion.store, "train"))
    assert report.changes[1] == "compared are different splits: val before, train after"
    assert not report.alarms


def test_a_report_is_read_again(champion: Champion, before: DriftReference) -> None:
    report = champion.drift(darker(champion), before)
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False, sort_keys=True))
    assert DriftReport.from_json(plain) == report
    assert [one["name"] for one in plain["measures"] if one["level"] != "none"] == list(alarms(report))


def _broken(plain: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {**plain, "version": 2}
    yield {**plain, "images": -1}
    yield {**plain, "class_counts": [1, 2]}
    yield {**plain, "distributions": {"brightness": {"counts": [1], "mean": 0.5}}}
    yield {**plain, "distributions": {"smell": {"counts": [1], "mean": 0.5}}}
    yield {**plain, "extra": 1}
    yield {key: value for key, value in plain.items() if key != "class_names"}
    calibration = {**plain["network"]["calibration"], "counts": [1]}
    yield {**plain, "network": {**plain["network"], "calibration": calibration}}
    yield {**plain, "network": {**plain["network"], "energy": {"mean": float("nan"), "std": 0.0}}}


def test_a_damaged_reference_is_refused(before: DriftReference, tmp_path: Path) -> None:
    path = tmp_path / REFERENCE
    for broken in _broken(before.to_json()):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"reference\.json .*measure the reference again"):
            DriftReference.read(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        DriftReference.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"the drift report \(before\) has version None"):
        DriftReport.from_json({"before": 3})


def test_rates_are_those_of_the_monitor_and_energy_that_of_the_card(champion: Champion) -> None:
    """All images of a split at once, by the code that measures them elsewhere."""
    measured = reference_of(
        champion.store, "val", champion.network, champion.config, network_images=10**6, energy_images=8
    ).network
    assert measured is not None
    rows = champion.store.split("val")
    loader = BatchLoader(rows, champion.config.data.transform, train=False)
    (batch,) = loader.epoch(EvaluationPlan(samples=len(rows), global_batch=len(rows)), epoch=0)
    with torch.no_grad(), SpikeMonitor(champion.network) as monitor:
        champion.network(batch.images)
    assert [one.layer for one in measured.layers] == [row["layer"] for row in monitor.table()]
    for one, row in zip(measured.layers, monitor.table(), strict=True):
        assert one.rate.mean == pytest.approx(row["rate"], rel=1e-5)
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:8])
    card = energy_card(champion.network, [batch.images[chosen]], REGISTERED_CONSTANTS)
    assert measured.energy is not None
    assert measured.energy.mean == pytest.approx(card.energy_mj)


def test_measuring_changes_neither_the_network_nor_random_numbers(champion: Champion) -> None:
    digest, state = weights_digest(champion.network), torch.get_rng_state()
    champion.network.train()
    reference_of(champion.store, "val", champion.network, champion.config, network_images=8, energy_images=2)
    assert champion.network.training
    champion.network.eval()
    assert weights_digest(champion.network) == digest
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_depend_on_the_seed_alone(champion: Champion) -> None:
    counted: list[tuple[int, int]] = []
    first, again, other = (
        reference_of(champion.store, "train", images=50, seed=seed, progress=lambda *done: counted.append(done))
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first.distributions != other.distributions
    assert (first.sampled, first.images) == (50, 1295)
    assert counted[49] == (50, 50)


def detection_store(out: Path, boxes: list[list[list[float]]], crowd: tuple[bool, ...] = ()) -> Store:
    """Raw images of 64 x 64 with these boxes in each."""
    image = ImageFormat(encoding="raw", shape=(3, 64, 64))
    pixels = np.random.default_rng(0).integers(0, 256, (len(boxes), 3, 64, 64), np.uint8)
    with StoreWriter(out, source="test", class_names="ab", image=image, options={}, category_ids=TABLE) as writer:
        writer.write_images("train", pixels, columns([(64, 64)] * len(boxes), boxes, crowd))
        writer.commit()
    return Store.open(out)


def test_numbers_and_areas_of_objects_are_compared(tmp_path: Path) -> None:
    small, large = [4.0, 4.0, 8.0, 8.0], [0.0, 0.0, 32.0, 48.0]

    def drift(boxes: list[list[list[float]]], name: str) -> DriftReport:
        return measure_drift(reference, detection_store(tmp_path / name, boxes))

    reference = reference_of(detection_store(tmp_path / "before", [[small, small]] * 60, (True, *[False] * 119)))
    assert reference.distributions["objects per image"].mean == pytest.approx(119 / 60), "without the crowd"
    assert reference.distributions["object area"].mean == pytest.approx(1 / 64)
    assert reference.class_counts == (119, 0)
    assert not drift([[small, small]] * 60, "same").alarms
    assert alarms(drift([[small]] * 60, "fewer")) == {"objects per image": "strong"}
    assert alarms(drift([[large, small]] * 60, "larger")) == {"object area": "strong"}
    assert alarms(drift([[]] * 60, "none")) == {"objects per image": "strong"}


def test_a_detector_is_measured_too(tmp_path: Path) -> None:
    config = load_config("scenes_spike_yolo", parse_overrides(["model.num_classes=2", "data.transform.size=64"]))
    torch.manual_seed(0)
    network = build_model(config.model).eval()
    store = detection_store(tmp_path / "store", [[[4.0, 4.0, 8.0, 8.0]]] * 4)
    measured = reference_of(store, "train", network, config, network_images=2, energy_images=1)
    assert measured.network is not None
    assert measured.network.energy is not None
    assert len(measured.network.layers) > 20
    assert measured.network.calibration is None
    assert measured.notes == ("the calibration cannot be measured on test: no answer has a confidence",)
    assert not compare(measured, measured).alarms


def test_encoded_images_of_varying_sizes(tmp_path: Path) -> None:
    sizes = [(32, 32), (48, 32), (32, 80)] * 4
    files = [black_png(*size) for size in sizes]
    split = make_encoded(tmp_path / "store", files, columns(sizes, [[[0.0, 0.0, 8.0, 8.0]]] * 12))
    reference = reference_of(Store.open(tmp_path / "store"))
    assert reference.images == len(split) == 12
    assert reference.image_shape is None
    assert reference.distributions["image height"].mean == pytest.approx((32 + 48 + 32) / 3)
    assert reference.distributions["image width"].mean == pytest.approx((32 + 32 + 80) / 3)
    assert reference.distributions["brightness"].counts[0] == 12


def test_scores_of_boxes_and_whether_they_found_an_object(tmp_path: Path) -> None:
    store = detection_store(tmp_path / "store", [[[0.0, 0.0, 10.0, 10.0], [30.0, 30.0, 20.0, 20.0]]], (False, True))
    targets = [store.split("train").annotations(0)]
    annotations = ground_truth(targets, "ab", TABLE)

    def box(score: float, *corner: float, category: int = TABLE[0]) -> dict[str, Any]:
        return {"image_id": 0, "category_id": category, "bbox": [*corner, 10.0, 10.0], "score": score}

    found = [
        box(0.9, 0.0, 1.0),  # overlaps by 9/11
        box(0.8, 0.0, 6.0),  # by 4/16
        box(0.7, 0.0, 0.0, category=TABLE[1]),  # of another class
        box(0.6, 35.0, 35.0),  # in the crowd
        box(0.5, 0.0, 0.0),  # the object is taken
    ]
    assert sorted(found_objects(annotations, found), reverse=True) == [
        (0.9, True),
        (0.8, False),
        (0.7, False),
        (0.5, False),
    ]
    assert found_objects(annotations, []) == []


def test_confidences_of_a_task(champion: Champion) -> None:
    task = build_task(champion.config, DataSummary.of(champion.store.manifest))
    loader = BatchLoader(champion.store.split("val"), champion.config.data.transform, train=False)
    (batch,) = loader.epoch(EvaluationPlan(samples=len(loader.split), global_batch=1000), epoch=0)
    predictions, targets = task.predict(champion.network, batch), task.targets(batch)
    pairs = task.confidences(predictions, targets)
    assert [right for _, right in pairs] == [
        one.classes[0] == target for one, target in zip(predictions, targets, strict=True)
    ]
    assert np.mean([right for _, right in pairs]) == pytest.approx(task.metrics(predictions, targets)["top1"])
    assert all(0.1 <= confidence <= 1 for confidence, _ in pairs)


def test_the_figure_is_drawn(champion: Champion, before: DriftReference, tmp_path: Path) -> None:
    report = champion.drift(darker(champion), before)
    bare = champion.drift(champion.store, DataSummary.of(champion.store.manifest))
    coloured = []
    for name, one in (("dark", report), ("bare", bare)):
        draw_drift(one, tmp_path / f"{name}.png")
        with PIL.Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 1000, "a message instead of a figure is narrower"
            coloured.append(float((np.ptp(np.asarray(image.convert("RGB"), np.int16), axis=2) > 40).mean()))
    assert coloured[0] > 0.05
    assert coloured[1] < 0.005, "nothing to compare"
