"""The READMEs' own family and task: added from outside as printed, trained, proved, registered, served."""

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

ROOT = Path(__file__).parents[2]

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


def printed(readme: str, *names: str) -> dict[str, str]:
    """Code blocks of a README by the file name in their first line; all of them in less than 60 lines."""
    found = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    blocks = {name: code for name, code in found if name in names}
    assert set(blocks) == set(names)
    assert sum(bool(line.strip()) for code in blocks.values() for line in code.splitlines()) < 60
    return blocks


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the plugins, as the READMEs print them, and a recipe that asks for the task."""
    folder = tmp_path_factory.mktemp("desk")
    task = printed("platform/README.md", "counting.py")
    family = printed("models/README.md", "spiking_vgg_config.py", "spiking_vgg.py")
    for name, code in {**task, **family}.items():
        (folder / name).write_text(code)
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


def test_a_family_from_outside_goes_the_whole_way(desk: Path) -> None:
    vgg = "model={family: spiking_vgg, widths: [8, 16], in_channels: 1, timesteps: 2}"
    plugin = ("--plugin", "spiking_vgg_config")
    settings = (vgg, "train.epochs=1", "registry.name=vgg")
    said = run(desk, "train", "digits", *settings, "--workers", "0", "--name", "vgg", *plugin)
    assert "vgg version 1 is champion" in said
    (version,) = json.loads(run(desk, "registry", "show", "vgg", "--json"))
    assert version["tags"]["family"] == "spiking_vgg"
    assert version["tags"]["spike_driven"] == "proved"
    assert version["metrics"]["energy_mj"] > 0
    assert "every layer is equal in both forms" in run(desk, "spike-check", "vgg", "--measured", "0", *plugin)
    assert "spiking_vgg" in run(desk, "config", "show", "digits", vgg, *plugin)
    assert "must be one of" in run(desk, "config", "show", "digits", vgg, code=2)
    near = run(desk, "config", "show", "digits", vgg.replace("widths", "width"), *plugin, code=2)
    assert "unknown key 'model.width'; did you mean 'model.widths'?" in near
    program = """
import sys, mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1]); mlflow.set_registry_uri(sys.argv[1])
print(mlflow.pyfunc.load_model("models:/vgg@champion").predict(np.zeros((2, 1, 8, 8), np.uint8)).shape)
"""
    paths = os.pathsep.join(filter(None, [str(desk), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "SPIKEFLEET_PLUGINS": "spiking_vgg_config"}
    served = [sys.executable, "-c", program, f"sqlite:///{desk / 'runs' / 'mlflow.db'}"]
    done = subprocess.run(served, cwd=desk, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["(2, 10)"], done.stderr


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
