"""The commands of the README's section "Your own data", run as they are written, on two real sets."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:The image decoding")]

README = Path(__file__).parents[2] / "README.md"


def commands(part: int) -> list[list[str]]:
    """The commands of a fenced block of the section."""
    section = README.read_text().partition("## Your own data")[2].partition("\n## ")[0]
    block = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[part]
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[3:] for line in lines if line.startswith("uv run spikefleet ")]


def run_as_written(part: int) -> list[str]:
    said = []
    for words in commands(part):
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, f"{words}: {done.output}"
        said.append(done.output)
    assert len(said) == 5
    return said


def photographs(root: Path) -> None:
    """Tiles of scikit-learn's two photographs, as JPEG, a folder for each."""
    for name, image in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for number in range(120):
            y, x = 13 * (number % 29), 37 * (number // 8)
            (root / name).mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image[y : y + 48, x : x + 48]).save(root / name / f"{number}.jpg", quality=90)


def as_yolo(store: Store, root: Path, counts: dict[str, int]) -> None:
    """Scenes of real digits in YOLO's layout, as an export has them."""
    for split, count in counts.items():
        rows = store.split(split)
        for row in range(count):
            image, found = rows.image(row), rows.annotations(row)
            picture, labels = (root / folder / split / f"{row}" for folder in ("images", "labels"))
            for path in (picture, labels):
                path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).expand(-1, -1, 3))).save(f"{picture}.png")
            size = np.array([found.width, found.height] * 2)
            boxes = np.concatenate([found.boxes[:, :2] + found.boxes[:, 2:] / 2, found.boxes[:, 2:]], axis=1) / size
            lines = [f"{k} " + " ".join(f"{v:.6f}" for v in box) for k, box in zip(found.labels, boxes, strict=True)]
            Path(f"{labels}.txt").write_text("\n".join(lines))
    names = json.dumps(list(store.manifest.class_names))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")


def test_from_a_folder_of_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    said = run_as_written(0)
    assert "read as source 'image_folder'" in said[0]
    assert "near-duplicates in val" in said[1]
    assert "sg_resnet_photos version 1 is champion" in said[2]
    assert "proved" in said[3]
    assert "sg_resnet_photos version 2" in said[4]


def test_from_an_export_of_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"train": 240, "val": 60}
    as_yolo(prepare("scenes", None, tmp_path / "scenes", test=1, **counts), tmp_path / "boxes", counts)
    monkeypatch.chdir(tmp_path)
    said = run_as_written(1)
    assert "read as source 'yolo'" in said[0]
    assert "spike_yolo_boxes version 1" in said[2]
    assert "proved" in said[3]
    assert "spike_yolo_boxes version 2" in said[4]
