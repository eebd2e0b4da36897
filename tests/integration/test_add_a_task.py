"""The README's own task: added from outside as printed, trained, registered, evaluated, asked and served."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

README = Path(__file__).parents[2] / "platform" / "README.md"

RECIPE = {
    "task": "counting",
    "model": {"stages": [1, 1], "width": 0.125, "stem": "strided", "decoder": "rate", "timesteps": 2, "num_classes": 8},
    "data": {
        "source": "scenes",
        "options": {"size": 64, "train": 96, "val": 24, "test": 24},
        "transform": {"kind": "detection", "size": 64, "horizontal_flip": 0.5},
    },
    "train": {"epochs": 1, "global_batch": 16},
    "optim": {"lr": 0.05},
    "checkpoint": {"metric": "exact"},
    "registry": {"name": "counter"},
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the plugin, as the README prints it, and a recipe that asks for its task."""
    folder = tmp_path_factory.mktemp("desk")
    block = re.search(r"```python\n(# counting\.py\n.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    assert len([line for line in block[1].splitlines() if line.strip()]) < 60
    (folder / "counting.py").write_text(block[1])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def run(desk: Path, *words: str, code: int = 0, **environment: str) -> str:
    program = Path(sys.executable).with_name("spikefleet")
    paths = os.pathsep.join(filter(None, [str(desk), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [program, *words],
        cwd=desk,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_task_from_outside_goes_the_whole_way(desk: Path) -> None:
    said = run(desk, "train", "recipe.yaml", "--workers", "1", "--name", "count", "--plugin", "counting")
    assert "val/exact" in said, "the task's own headline is shown"
    assert "counter version 1 is champion" in said
    record = json.loads((desk / "runs" / "count" / "run.json").read_text())
    assert record["plugins"] == ["counting"]
    assert set(record["test"]) == {"exact", "within_one"}
    said = run(desk, "evaluate", "models:/counter@champion", SPIKEFLEET_PLUGINS="counting")
    assert "within_one" in said
    Image.new("RGB", (64, 64)).save(desk / "black.png")
    said = run(desk, "predict", "models:/counter@champion", "black.png", "--json", "--plugin", "counting")
    (answer,) = json.loads(said[said.index("[") : said.rindex("]") + 1])
    assert answer["objects"] in range(8)
    said = run(desk, "predict", "count", "black.png", "--out", "black_counted.png", "--plugin=counting")
    assert (desk / "black_counted.png").stat().st_size > 1000


def test_without_its_plugin_it_is_one_sentence(desk: Path) -> None:
    assert "task" in run(desk, "train", "recipe.yaml", "--workers", "0", code=2)
    for words in (("evaluate", "models:/counter@champion"), ("evaluate", "count")):
        said = run(desk, *words, code=2)
        assert "was trained with plugin counting, which is not loaded; give --plugin counting" in said
        assert "Traceback" not in said


def test_a_plugin_that_fails_is_named(desk: Path) -> None:
    (desk / "broken.py").write_text("raise OSError('no licence')")
    said = run(desk, "recipes", "--plugin", "broken", code=2)
    assert "plugin broken cannot be loaded: OSError: no licence" in said
