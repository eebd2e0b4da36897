"""Detection from end to end on scenes of real digits: train, resume, evaluate, prove, predict, register.

Ray is not needed for it; `tests/cluster` trains a detector on Ray's workers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.data_summary import DataSummary
from spikefleet.tasks.coco_metrics import COCO_METRICS, evaluate_boxes
from spikefleet.tasks.per_image import Boxes, PerImage
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store
from support.ranks import run_undisturbed
from support.snapshots import cut, differences, end_of

SMALL = {"train": 48, "val": 16, "test": 16, "size": 64}
QUICK = [
    "model.criterion.score_threshold=0",
    "train.epochs=2",
    "data.transform.size=64",
    "data.transform.close_mosaic_epochs=1",
    "checkpoint.every_steps=2",
]
RETINA = ["train.epochs=2", "data.transform.size=64", "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("stores") / "scenes"
    prepare("scenes", None, store, **SMALL)
    return store


@pytest.mark.parametrize(
    ("recipe", "settings", "workers"), [("scenes_spike_yolo", QUICK, 2), ("scenes_retinanet", RETINA, 0)]
)
def test_a_detector_that_is_stopped_resumes_bit_for_bit(
    recipe: str, settings: list[str], workers: int, scenes: Path, tmp_path: Path, no_figures: None
) -> None:
    """In two ranks, and in this process."""
    overrides = [*settings, f"cluster.workers={workers}", "checkpoint.keep_last=9"]
    config, store = load_config(recipe, parse_overrides(overrides)), Store.open(scenes)

    def trained(run_dir: Path) -> None:
        if workers:
            run_undisturbed(config, scenes, run_dir)
        else:
            train(config, store, run_dir, ProcessGroup.single(), NullSink())

    trained(tmp_path / "whole")
    cut(tmp_path / "whole", 2, tmp_path / "stopped")
    trained(tmp_path / "stopped")
    end = end_of(tmp_path / "whole")
    assert len(end.state["history"]) == 2
    assert differences(end_of(tmp_path / "stopped"), end) == []
    check_figures(tmp_path / "whole" / "report", DataSummary.of(store.manifest))


def check_figures(report: Path, data: DataSummary) -> None:
    """The figures of an evaluation are those of its results by image, of all test images, whichever rank had them."""
    results = PerImage.read(report / "evaluation.npz").results
    assert isinstance(results, Boxes)
    assert len({one.image_id for one in results.targets}) == len(results.targets) == SMALL["test"]
    again = evaluate_boxes(*results.coco(data.class_names, data.category_ids), results.max_detections)
    assert again.twelve == json.loads((report / "evaluation.json").read_text())["metrics"]


# ---------------------------------------------------------------------------------------- as a user meets it


class Desk:
    """A directory in which commands are given."""

    def __init__(self, folder: Path, scenes: Path) -> None:
        self.folder, self.scenes = folder, scenes

    def run(self, *words: str, code: int = 0) -> str:
        """In this process, which has the libraries loaded."""
        places = ["--runs-dir", str(self.folder / "runs")]
        done = CliRunner().invoke(app, [*words, *places])
        assert done.exit_code == code, f"{words}: exit code {done.exit_code}\n{done.output}\n{done.exception!r}"
        return " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def desk(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A desk where a small detector has been trained."""
    desk = Desk(tmp_path_factory.mktemp("desk"), scenes)
    # So little training leaves most layers silent, and then nothing is shown; stronger currents wake them.
    quick = [*QUICK, "model.neuron.input_scale=4"]
    words = ["train", "scenes_spike_yolo", "--name", "small", "--workers", "0", f"data.store={scenes}", *quick]
    assert "spike_yolo_scenes version 1 is champion" in desk.run(*words)
    return desk


NETWORK = "models:/spike_yolo_scenes@champion"


def test_evaluation_gives_cocos_figures_by_class(desk: Desk, tmp_path: Path) -> None:
    said = desk.run("evaluate", NETWORK, "--data", str(desk.scenes), "--out", str(tmp_path / "report"))
    assert "on 16 test samples" in said
    assert "AP50-95" in said
    assert "map50_95" in said
    written = {path.name for path in (tmp_path / "report").iterdir()}
    files = {"evaluation.json", "ground_truth.json", "predictions.json"}
    assert written == files | {"precision_recall.png", "confusion.png"}
    report = desk.folder / "runs" / "small" / "report"
    assert {"training_batch.png", "learning_curve.png", "energy.png"} <= {path.name for path in report.iterdir()}
    check_figures(report, DataSummary.read(desk.folder / "runs" / "small"))
    compared = desk.run("registry", "compare", NETWORK.removeprefix("models:/"), NETWORK)
    assert "the images do not show which one is better: test/map50_95" in compared
    assert "on the same 16 images" in compared
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["metrics"].keys() <= set(COCO_METRICS)


def test_the_proof_goes_with_the_version(desk: Desk, tmp_path: Path) -> None:
    said = desk.run("spike-check", NETWORK, "--data", str(desk.scenes), "--out", str(tmp_path / "proof.json"))
    assert "every layer is equal in both forms" in said
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert proof["verdict"] == "proved"
    assert all(layer["equal"] for layer in proof["proof"]["layers"])
    assert [count["dtype"] for count in proof["flips"]] == ["float32", "bfloat16"]
    assert proof["metrics"]["trained"].keys() == proof["metrics"]["binary"].keys()
    assert [leg["verdict"] for leg in proof["legs"]] == ["equal"] * 3
    shown = desk.run("registry", "show", "spike_yolo_scenes")
    assert "spike_driven proved" in shown
    assert "proof_metric" in shown
    desk.run("registry", "pull", "spike_yolo_scenes@champion", "--out", str(tmp_path / "pulled"))
    assert json.loads((tmp_path / "pulled" / "spike_check.json").read_text())["verdict"] == "proved"


def test_a_network_without_spikes_has_nothing_to_prove_and_one_with_sums_is_refuted(desk: Desk, scenes: Path) -> None:
    from spikefleet.certificates.spike_check import check_spikes
    from spikefleet.data_summary import DataSummary
    from spikefleet.tasks import build_task
    from spikefleet_models.families import build_model

    store = Store.open(scenes)
    manifest = store.manifest

    def verdict(*overrides: str) -> Any:
        config = load_config("scenes_retinanet", parse_overrides([*RETINA, *overrides]))
        task = build_task(config, DataSummary.of(manifest))
        return check_spikes(build_model(config.model).eval(), task, config, store.split("val"), images=2)

    assert verdict("model.backbone.connection=ann", "model.backbone.decoder=rate").verdict == "not spiking"
    sums = verdict("model.backbone.connection=add", "model.backbone.stages=[2,1,1]")
    assert sums.verdict == "refuted"
    assert "binary events" in sums.why


def test_prediction_draws_boxes_on_each_picture(desk: Desk, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    split = Store.open(desk.scenes).split("test")
    for row, side in ((0, 64), (1, 100)):
        picture = Image.fromarray(split.image(row).permute(1, 2, 0).numpy()).resize((side, 64))
        picture.save(photos / f"{row}.png")
    out = tmp_path / "out"
    said = desk.run("predict", NETWORK, str(photos), "--out", str(out), "--score", "0", "--json")
    answers = [json.loads(answer) for answer in re.split(r"(?<=\}) (?=\{\"image\": )", said[: said.rindex("}") + 1])]
    assert [Path(answer["image"]).name for answer in answers] == ["0.png", "1.png"]
    boxes = np.array([found["box"] for found in answers[1]["objects"]])
    assert len(boxes)
    assert boxes.min() >= 0
    assert (boxes.max(axis=0) <= [100, 64, 100, 64]).all()
    assert {path.name for path in out.iterdir()} == {"0.png", "1.png"}
    single = tmp_path / "single.png"
    desk.run("predict", NETWORK, str(photos / "1.png"), "--out", str(single), "--score", "0")
    with Image.open(single) as drawn:
        assert drawn.width > drawn.height
    assert desk.run("predict", NETWORK, str(photos), "--out", str(single), code=2).endswith("give a folder")
    text = tmp_path / "text.txt"
    text.write_text("")
    assert "text.txt is a file" in desk.run("predict", NETWORK, str(photos), "--out", str(text), code=2)
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    assert "would overwrite what the command reads" in desk.run(
        "predict", NETWORK, str(photos), "--out", str(photos), code=2
    )
    (photos / "torn.png").write_bytes(before["0.png"][:20])
    fresh = tmp_path / "fresh"
    said = desk.run("predict", NETWORK, str(photos), "--out", str(fresh), code=1)
    assert "1 of 3 images cannot be read; the others are answered" in said
    assert {path.name for path in fresh.iterdir()} == {"0.png", "1.png"}


def test_mlflow_loads_a_detector_by_its_uri(desk: Desk) -> None:
    import mlflow

    uri = f"sqlite:///{desk.folder / 'runs' / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model(NETWORK)
    images = Store.open(desk.scenes).split("test").gather(np.arange(2))
    found = model.predict(images)
    assert len(found) == 2
    assert {"name", "score", "box"} <= found[0][0].keys()


def test_what_does_not_go_together_is_refused_before_anything_is_written(desk: Desk, scenes: Path) -> None:
    runs = sorted((desk.folder / "runs").iterdir())

    def refuse(*words: str) -> str:
        return desk.run("train", *words, "--workers", "0", code=2)

    assert "task=classification, but model.family=spike_yolo supports detection" in refuse(
        "scenes_spike_yolo", "task=classification"
    )
    assert "num_classes=7, but the data has 10 classes" in refuse(
        "scenes_spike_yolo", "model.num_classes=7", f"data.store={scenes}"
    )
    assert "checkpoint.metric='top1' must be a metric of the task: map50_95" in refuse(
        "scenes_spike_yolo", "checkpoint.metric=top1", f"data.store={scenes}"
    )
    assert "data.transform.divisor=4 must be a multiple of the network's largest stride 16" in refuse(
        "scenes_spike_yolo", "data.transform.divisor=4", "data.transform.size=100"
    )
    assert "model.neuron.bound=0" in refuse("scenes_spike_yolo", "model.neuron.bound=0")
    assert "data.root" in refuse("coco_spike_yolo_s") or "prepare" in refuse("coco_spike_yolo_s")
    assert sorted((desk.folder / "runs").iterdir()) == runs
