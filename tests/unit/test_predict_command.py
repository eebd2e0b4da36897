"""`spikefleet predict`: answers in each form, files in the formats of other programs, a sentence for the rest."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner, Result

from spikefleet.cli import app
from spikefleet.inference import answer_files
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store
from support.small_detector import CLASSES, noise, small_classifier, small_detector, write_network

SIZES = {"1.png": (64, 64), "2.png": (40, 90), "deep/1.png": (90, 40)}

Predict = Callable[..., Result]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a detector, a classifier, and photographs."""
    folder = tmp_path_factory.mktemp("desk")
    write_network(small_detector(), folder / "detector")
    write_network(small_classifier(), folder / "classifier")
    for number, (name, size) in enumerate(SIZES.items()):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(*size, seed=number)).save(path)
    return folder


@pytest.fixture(scope="module")
def predict(desk: Path) -> Predict:
    """Runs the command there; checks its exit code."""

    def run(*words: str, code: int = 0, stdin: bytes = b"") -> Result:
        with contextlib.chdir(desk):
            done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["predict", *words], input=stdin)
        assert done.exit_code == code, f"{words}: {done.exit_code}\n{done.output}\n{done.exception!r}"
        return done

    return run


@pytest.fixture(scope="module")
def answers(predict: Predict) -> list[dict[str, Any]]:
    """Those of all photographs."""
    lines = predict("detector", "photos", "--recursive", "--json", "--score", "0.5").stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_answers_as_rows_of_csv(predict: Predict, answers: list[dict[str, Any]]) -> None:
    assert [one["image"] for one in answers] == [f"photos/{name}" for name in SIZES]
    assert all(one["objects"] for one in answers)
    done = predict("detector", "photos", "--recursive", "--csv", "--score", "0.5", "--batch", "3")
    assert "3 images in " in done.stderr
    assert "images/s" in done.stderr
    header, *rows = csv.reader(io.StringIO(done.stdout))
    assert header == ["image", "frame", "time_s", "class", "score", "x1", "y1", "x2", "y2", "error"]
    expected = [
        [one["image"], found["name"], found["score"], *found["box"]] for one in answers for found in one["objects"]
    ]
    assert [[row[0], row[3]] for row in rows] == [one[:2] for one in expected]
    printed = np.array([row[4:9] for row in rows], float)
    assert np.allclose(printed, np.array([one[2:] for one in expected], float), rtol=0, atol=1e-4)
    empty = list(csv.reader(io.StringIO(predict("detector", "photos/1.png", "--csv", "--score", "1").stdout)))
    assert empty[1:] == [["photos/1.png", *[""] * 9]]
    header, row = csv.reader(io.StringIO(predict("classifier", "photos/1.png", "--csv").stdout))
    assert header == ["image", "frame", "time_s", "class", "probability", "error"]
    assert row[3] in CLASSES
    assert 0 < float(row[4]) <= 1


def test_a_list_on_stdin_with_bad_entries(predict: Predict, desk: Path) -> None:
    (desk / "torn.png").write_bytes((desk / "photos" / "1.png").read_bytes()[:50])
    listed = b"photos/1.png\ngone.png\r\n\ntorn.png\nphotos/deep\n"
    done = predict("classifier", "-", "--csv", code=1, stdin=listed)
    rows = list(csv.reader(io.StringIO(done.stdout)))[1:]
    assert [row[0] for row in rows] == ["photos/1.png", "gone.png", "torn.png", "photos/deep/1.png"]
    assert [bool(row[-1]) for row in rows] == [False, True, True, False]
    assert "2 of 4 images cannot be read; the others are answered" in done.stderr
    done = predict("classifier", "-", "--json", stdin=b"photos/1.png\0photos/2.png\0")
    assert [json.loads(line)["image"] for line in done.stdout.splitlines()] == ["photos/1.png", "photos/2.png"]
    assert "no image is listed on stdin" in predict("classifier", "-", code=2, stdin=b"\n").stderr
    done = predict("classifier", "-", "--json", stdin=b"\xef\xbb\xbfphotos/1.png\r\n")
    assert json.loads(done.stdout)["image"] == "photos/1.png"
    for encoding in ("utf-16-le", "utf-16-be"):
        done = predict("classifier", "-", code=2, stdin="\ufeffphotos/1.png\n".encode(encoding))
        assert "the list on stdin is UTF-16, as PowerShell writes it; write it as UTF-8" in done.stderr
    assert "a name in it is too long" in predict("classifier", "n" * 5000, code=2).stderr


def test_one_png_holds_the_first_images(predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_files, "MOST_DRAWN", 2)
    done = predict("classifier", "photos", "--recursive", "--out", str(tmp_path / "sheet.png"))
    assert "1 image is not drawn: " in done.stderr
    assert "holds the first 2" in done.stderr
    done = predict("classifier", "photos", "--out", str(tmp_path / "two.png"))
    assert "not drawn" not in done.stderr


def test_labels_in_yolos_format_are_read_as_a_data_set(
    predict: Predict, answers: list[dict[str, Any]], desk: Path, tmp_path: Path
) -> None:
    predict("detector", "photos", "--recursive", "--yolo", str(tmp_path / "labels"), "--score", "0.5")
    files = {path.relative_to(tmp_path / "labels").as_posix() for path in (tmp_path / "labels").rglob("*.txt")}
    assert files == {"1.txt", "2.txt", "deep/1.txt", "classes.txt"}
    (tmp_path / "images").symlink_to(desk / "photos")
    (tmp_path / "set").mkdir()
    for name in ("labels", "images"):
        (tmp_path / name).rename(tmp_path / "set" / name)
    names = "".join(f"  - {json.dumps(name)}\n" for name in CLASSES)
    (tmp_path / "set" / "data.yaml").write_text(f"train: images\nval: images\nnames:\n{names}")
    store = prepare("yolo", tmp_path / "set", tmp_path / "store", parallel=1)
    assert_same_boxes(store, answers)


def test_a_data_set_in_cocos_format(
    predict: Predict, answers: list[dict[str, Any]], desk: Path, tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    predict("detector", "photos", "--recursive", "--coco", str(file), "--score", "0.5")
    with contextlib.redirect_stdout(io.StringIO()):
        read: Any = COCO(str(file))
    assert [one["file_name"] for one in read.loadImgs(read.getImgIds())] == list(SIZES)
    assert [one["name"] for one in read.loadCats(read.getCatIds())] == list(CLASSES)
    assert [one["score"] for one in read.loadAnns(read.getAnnIds(imgIds=[1]))] == [
        found["score"] for found in answers[0]["objects"]
    ]
    store = prepare(
        "coco", None, tmp_path / "store", split="train", images=desk / "photos", annotations=file, parallel=1
    )
    assert_same_boxes(store, answers)


def assert_same_boxes(store: Store, answers: list[dict[str, Any]]) -> None:
    split = store.split("train")
    assert len(split) == len(answers)
    for row, answer in enumerate(answers):
        annotations = split.annotations(row)
        found = answer["objects"]
        expected = np.array([one["box"] for one in found])
        expected[:, 2:] -= expected[:, :2]
        order, other = np.lexsort(annotations.boxes.T), np.lexsort(expected.T)
        assert np.allclose(annotations.boxes[order], expected[other], rtol=0, atol=1e-9)
        labels = [CLASSES.index(one["name"]) for one in found]
        assert annotations.labels[order].tolist() == [labels[place] for place in other]


def test_crops_are_the_pixels_of_the_boxes_and_stay_in_their_folder(
    predict: Predict, answers: list[dict[str, Any]], desk: Path, tmp_path: Path
) -> None:
    predict("detector", "photos", "--recursive", "--crops", str(tmp_path / "crops"), "--score", "0.5")
    crops = sorted((tmp_path / "crops").rglob("*.png"))
    assert len(crops) == sum(len(list(one["objects"])) for one in answers)
    folders = {name: ".._up".strip(" .") if name == "../up" else name for name in CLASSES}
    for answer, stem in zip(answers, ("1", "2", "1-2"), strict=True):
        image = np.asarray(Image.open(desk / answer["image"]))
        for number, found in enumerate(answer["objects"]):
            with Image.open(tmp_path / "crops" / folders[found["name"]] / f"{stem}-{number}.png") as crop:
                left, top = np.floor(found["box"][:2]).astype(int)
                right, bottom = np.ceil(found["box"][2:]).astype(int)
                assert np.array_equal(np.asarray(crop), image[top:bottom, left:right])
    assert {path.name for path in tmp_path.iterdir()} == {"crops"}


def test_frames_of_a_video_have_their_numbers(predict: Predict, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    from unit.test_prediction import FRAMES, write_video

    clip = tmp_path / "clip.mkv"
    write_video(clip, FRAMES, "ffv1", "bgr0")
    done = predict("detector", str(clip), "--json", "--every", "3", "--out", str(tmp_path / "out"), "--score", "0.5")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["frame"], one["time_s"]) for one in found] == [(0, 0.0), (3, 0.3), (6, 0.6)]
    assert {path.name for path in (tmp_path / "out" / "clip.mkv").iterdir()} == {
        *("000000.png", "000003.png", "000006.png")
    }
    assert f"{clip} frame 6: class" in predict("classifier", str(clip)).stdout
    again = predict("detector", str(clip), "--out", str(tmp_path / "out"), code=2)
    assert "clip.mkv is not empty; give another place, or --force" in " ".join(again.stderr.split())


def test_what_does_not_go_together_is_refused_before_anything_is_written(predict: Predict, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        return " ".join(predict(*words, code=2).stderr.split())

    assert "give one of them" in refused("detector", "photos", "--json", "--csv")
    assert "--yolo x is for boxes, and classifier finds none" in refused("classifier", "photos", "--yolo", "x")
    assert "--tile merges the boxes of tiles" in refused("classifier", "photos", "--tile", "64")
    assert "has no overlap threshold" in refused("classifier", "photos", "--nms", "0.5")
    assert "would both be 1; give the folder that holds both" in refused(
        "detector", "photos/1.png", "photos/deep/1.png", "--yolo", str(tmp_path / "labels")
    )
    for option, place in {"--crops": "photos", "--coco": "photos/1.png", "--out": "photos"}.items():
        said = refused("detector", "photos", option, place, "--force")
        assert "where the command reads files" in said or "would overwrite what the command reads" in said, option
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "is not empty" in refused("detector", "photos", "--crops", str(tmp_path / "full"))
    done = predict("detector", "photos/1.png", "--score", "0", "--tile", "32", "--nms", "0.3", "--confidence", "0.2")
    assert "photos/1.png: object" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_option_that_would_do_nothing_is_refused(predict: Predict, tmp_path: Path) -> None:
    said = predict("detector", "photos", "--overlap", "0.5", code=2).stderr
    assert "--overlap 0.5 is of tiles; give their side with --tile" in " ".join(said.split())
    said = predict("classifier", "photos", "--every", "3", code=2).stderr
    assert "--every 3 is for the frames of videos, and there is no video" in " ".join(said.split())
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    said = predict("classifier", str(tmp_path / "clips"), code=2).stderr
    assert "has videos and no images; name the videos, or give a pattern" in " ".join(said.split())
