"""`spikefleet inspect`: what is on the page is what was measured, and the page asks for nothing outside."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console

from spikefleet.certificates.drift_reference import Calibration
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_summary import DataSummary
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.inspection.measuring import Inspection, _gradients, expected_calibration_error, inspect_network
from spikefleet.inspection.page import page_text, write_page
from spikefleet.tasks.coco_metrics import FoundBoxes
from spikefleet.tasks.mistakes import worst_detections, wrong_answers
from spikefleet.training.gradient_check import check_gradients, training_batch
from spikefleet_models.families import build_model
from spikefleet_pipelines.store.annotations import Annotations
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.writer import StoreWriter
from support.browser import chromium, page_of_browser
from unit.test_detection_targets import TABLE, columns

NAMES = ("<script>alert(1)</script>", 'a & b "q"', "http://outside.example/x.png", "日本\x07語", "plain")
QUIET = Console(quiet=True)


def classes_store(out: Path) -> Store:
    """Images of five classes, each brighter in one place."""
    image = ImageFormat(encoding="raw", shape=(1, 8, 8))
    with StoreWriter(out, source="digits", class_names=NAMES, image=image, options={}) as writer:
        for seed, (split, count) in enumerate({"train": 40, "test": 23}.items()):
            numbers = np.random.default_rng(seed)
            labels = np.arange(count) % len(NAMES)
            images = numbers.integers(0, 120, (count, 1, 8, 8)).astype(np.uint8)
            images[np.arange(count), 0, labels] += 100
            writer.write_images(split, images, labels)
        writer.commit()
    return Store.open(out)


def network_on(store: Store, recipe: str, *overrides: str) -> TrainedNetwork:
    config = load_config(recipe, parse_overrides([f"data.store={store.location}", "cluster.workers=0", *overrides]))
    torch.manual_seed(0)
    return TrainedNetwork("models:/mine@champion", build_model(config.model).eval(), config, summary(store))


def summary(store: Store) -> DataSummary:
    return DataSummary.of(store.manifest)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    folder = tmp_path_factory.mktemp("inspected")
    small = ("model.width=0.125", "model.num_classes=5", "model.timesteps=3", "data.transform.normalise=none")
    trained = network_on(classes_store(folder / "store"), "digits", *small)
    for module in trained.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 4)  # so that neurons fire
    return inspect_network(trained, "test", folder, QUIET)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    folder = tmp_path_factory.mktemp("inspected")
    objects = [[[8.0, 8.0, 40.0, 40.0]] if index % 2 else [] for index in range(4)]
    image = ImageFormat(encoding="raw", shape=(3, 64, 64))
    with StoreWriter(
        folder / "store", source="scenes", class_names=NAMES[:2], image=image, options={}, category_ids=TABLE
    ) as writer:
        for split in ("train", "test"):
            images = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), np.uint8)
            writer.write_images(split, images, columns([(64, 64)] * 4, objects))
        writer.commit()
    small = ("model.num_classes=2", "data.transform.size=64", "train.eval_batch=2")
    trained = network_on(Store.open(folder / "store"), "scenes_spike_yolo", *small)
    return inspect_network(trained, "test", folder, QUIET)


class Addresses(HTMLParser):
    """What a browser would ask for: addresses of attributes, and of styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.found += [one for name, value in attrs if name == "style" for one in _outside_style(value or "")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "style":
            self.found += _outside_style(data)


def _outside_style(text: str) -> list[str]:
    return re.findall(r"@import[^;]*|url\([^)]*\)", text)


def outside(text: str) -> list[str]:
    """Addresses that are neither inside the page nor hold their content."""
    parser = Addresses()
    parser.feed(text)
    return [address for address in parser.found if not address.startswith(("#", "data:"))]


def tables(text: str) -> dict[str, list[list[str]]]:
    """The cells of each section of a page, by its key; the page must be well-formed XML."""
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    return {
        section.attrib["id"]: [["".join(cell.itertext()) for cell in row] for row in section.iter("tr")]
        for section in root.iter("section")
    }


def test_the_page_asks_for_nothing_outside(classes: Inspection, boxes: Inspection) -> None:
    for inspection in (classes, boxes):
        text = page_text(inspection)
        assert outside(text) == []
        assert "data:image/png;base64," in text
        assert "default-src 'none'" in text
        assert "<script" not in text
        assert "//" not in re.sub('data:image/png;base64,[^"]*', "", text).replace(NAMES[2], "")


@pytest.mark.parametrize(
    "made", ['<img src="http://a/b.png"/>', '<link href="//a/b"/>', '<p style="background:url(x)"></p>']
)
def test_an_address_outside_is_noticed(made: str) -> None:
    assert len(outside(f"<html><style>p {{ color: red; }}</style><body>{made}</body></html>")) == 1


def test_names_are_escaped(classes: Inspection) -> None:
    text = page_text(classes)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "日本\\x07語" in text
    header, *rows = tables(text)["confusion"]
    assert header[1:] == [row[0] for row in rows]
    assert header[1:3] == list(NAMES[:2])


def test_numbers_are_those_that_were_measured(classes: Inspection) -> None:
    found = tables(page_text(classes))
    details = classes.details
    assert dict(row[:2] for row in found["metrics"][1:]) == {
        name: f"{value:.2%}" for name, value in details["metrics"].items()
    }
    assert [row[1:] for row in found["confusion"][1:]] == [list(map(str, row)) for row in details["confusion"]]
    assert [row[1:] for row in found["latency"][1:]] == [[f"{one:.2%}"] for one in classes.evaluation.over_time]
    assert [row[1:4] for row in found["firing"][1:]] == [
        [f"{rate:.3f}" for rate in row["rate_per_step"]] for row in classes.evaluation.layers
    ]
    assert [row[2] for row in found["energy"][1:]] == [f"{row['energy_mj']:.4g}" for row in classes.energy.rows()]
    assert classes.gradients is not None
    assert [row[2] for row in found["gradients"][1:]] == [
        f"{row.gradient_norm:.3g}" for row in classes.gradients.layers
    ]
    assert sum(int(row[1]) for row in found["calibration"][1:]) == details["samples"]


def test_gradients_are_those_of_the_network_without_side_branches(classes: Inspection) -> None:
    trained = classes.trained
    store = Store.open(trained.config.data.store)  # type: ignore[arg-type]
    shortcut = trained.config.shortcut.model_copy(update={"where": "stage"})
    branched = trained.config.model_copy(update={"shortcut": shortcut})
    batch, weights = training_batch(branched, store, 32), trained.network.state_dict()
    check, remark = _gradients(replace(trained, config=branched), store)
    assert check is not None
    assert check.layers == check_gradients(trained.config, batch, summary(store), weights=weights).layers
    assert check.layers != check_gradients(branched, batch, summary(store), weights=weights).layers
    assert remark.endswith("without the side branches of the training.")


def test_other_data_than_that_of_the_training_is_named(classes: Inspection) -> None:
    assert "Measured on 23 samples of test; trained on" in page_text(classes)
    other = replace(classes.measured_on, name="night", content_hash="e" * 64)
    text = page_text(replace(classes, measured_on=other, location="stores/night"))
    assert "Measured on 23 samples of test of night in stores/night (content eeeeeeeeeeee); trained on" in text


def test_the_latency_curve_of_images_ends_with_the_accuracy(classes: Inspection) -> None:
    over_time = classes.evaluation.over_time
    assert len(over_time) == 3
    assert over_time[-1] == pytest.approx(classes.details["metrics"]["top1"])


def test_mistakes_are_the_surest_wrong_answers(classes: Inspection) -> None:
    predictions, targets = classes.evaluation.predictions, classes.evaluation.targets
    assert classes.mistakes
    sure = [predictions[one.row].probabilities[0] for one, _ in classes.mistakes]
    assert sure == sorted(sure, reverse=True)
    assert all(predictions[one.row].classes[0] != targets[one.row] for one, _ in classes.mistakes)
    store = Store.open(classes.trained.config.data.store)  # type: ignore[arg-type]
    for mistake, ((_, image),) in classes.mistakes:
        assert torch.equal(image, store.samples("test").image(mistake.row))


def test_right_answers_are_no_mistakes() -> None:
    assert wrong_answers([0, 1], [0.9, 0.8], [0, 1], "ab", 5) == []
    (found,) = wrong_answers([0, 1], [0.9, 0.8], [0, 0], "ab", 5)
    assert (found.row, found.says) == (1, "b 80.0%, is a")


def test_boxes_are_counted_by_what_is_wrong_with_them() -> None:
    def annotated(*labels: int) -> Annotations:
        count = len(labels)
        place = np.array([[20.0 * k, 0, 10, 10] for k in range(count)]).reshape(-1, 4)
        numbers = np.array(labels, np.int64)
        return Annotations(
            1, 64, 64, place, numbers, numbers, np.zeros(count, bool), np.full(count, 100.0), np.arange(count)
        )

    def found(*labels: int, shift: float = 0.0) -> FoundBoxes:
        corners = np.array([[20.0 * k + shift, 0, 20 * k + 10 + shift, 10] for k in range(len(labels))]).reshape(-1, 4)
        return FoundBoxes(corners, np.full(len(labels), 0.9), np.array(labels, np.int64))

    said = worst_detections(
        [found(0, 1), found(), found(1, 1), found(0, shift=100), found(0)],
        [annotated(0, 1), annotated(0, 1, 0), annotated(0, 1), annotated(), annotated(0)],
        2,
        0.3,
        9,
    )
    assert [(one.row, one.says) for one in said] == [
        (1, "3 of 3 objects missed"),
        (2, "1 of 2 objects with another class"),
        (3, "1 box on nothing"),
    ]


def test_a_detector_gets_what_applies(boxes: Inspection) -> None:
    found = tables(page_text(boxes))
    assert "latency" not in found
    assert [row[0] for row in found["classes"][1:3]] == list(NAMES[:2])
    assert [row[0].split()[0] for row in found["classes"][4:]] == ["small", "medium", "large"]
    assert found["confusion"][0][-1] == "background"
    assert [one.says for one, _ in boxes.mistakes] == ["1 of 1 object missed"] * 2
    assert [name for name, _ in boxes.mistakes[0][1]] == ["annotated", "found"]


def test_the_calibration_error_is_the_weighted_gap() -> None:
    answers = [(0.95, True)] * 3 + [(0.95, False)] + [(0.05, False)] * 2
    expected = (4 * abs(0.75 - 0.95) + 2 * 0.05) / 6
    assert expected_calibration_error(Calibration.of(answers)) == pytest.approx(expected)
    assert expected_calibration_error(Calibration.of([(1.0, True)] * 3)) == 0
    assert expected_calibration_error(Calibration.of([])) == 0


def test_the_recorded_proof_is_on_the_page(classes: Inspection) -> None:
    assert tables(page_text(classes))["proof"] == []
    layer = {"name": "stem", "kind": "neuron", "timesteps": 3, "bound": 1, "equal": False, "binary": True, "ones": 0.25}
    legs = [{"says": "trained network = deployed form"}]
    proof = {"verdict": "refuted", "why": "<b>", "legs": legs, "proof": {"layers": [{**layer, "headroom_bits": None}]}}
    text = page_text(replace(classes, trained=replace(classes.trained, read_proof=lambda: proof)))
    assert tables(text)["proof"][1] == ["stem", "neuron", "3", "1", "no", "yes", "25.00%", "-"]
    assert "Verdict: refuted. &lt;b&gt;." in text


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_a_browser_shows_it_without_complaint(
    classes: Inspection, boxes: Inspection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = chromium()
    assert program is not None
    wide: Callable[[str], str] = lambda text: text.replace("</body>", '<div style="width:500px">x</div></body>')  # noqa: E731
    broken: Callable[[str], str] = lambda text: text.replace("</body>", '<img src="missing.png"/></body>')  # noqa: E731
    with page_of_browser(program, tmp_path / "profile") as page:
        for name, inspection in {"classes": classes, "boxes": boxes}.items():
            path = tmp_path / f"{name}.html"
            write_page(inspection, path)
            for width in (400, 1280):
                page.open(path.as_uri(), width)
                assert page.complaints == []
                assert page.requests == [path.as_uri()]
                assert page.value("document.documentElement.scrollWidth") <= width
                size = "Math.min(...[...document.querySelectorAll('p, td, figcaption, svg text')].map(one =>"
                size += " parseFloat(getComputedStyle(one).fontSize)))"
                assert page.value(size) >= 11
                assert page.value("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        path.write_text(wide(broken(path.read_text())))
        page.open(path.as_uri(), 400)
        assert page.value("document.documentElement.scrollWidth") > 400
        assert page.complaints
