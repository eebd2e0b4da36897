"""The READMEs' own family and task: added from outside as printed, trained, proved, registered, served."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from support.commands import give, run_commands

ROOT = Path(__file__).parents[2]

RECIPE = {
    "task": "counting",
    "model": {"stages": [1, 1], "width": 0.125, "stem": "strided", "decoder": "rate", "timesteps": 2, "num_classes": 8},
    "data": {
        "source": "scenes",
        "options": {"size": 64, "train": 96, "val": 24, "test": 24},
        "transform": {"kind": "detection", "size": 64, "horizontal_flip": 0.5},
    },
    "train": {"epochs": 3, "global_batch": 16},  # after one, the last layer is silent and nothing is shown
    "optim": {"lr": 0.05},
    "checkpoint": {"metric": "exact"},
    "registry": {"name": "counter"},
}


VGG = 'model={"family": "spiking_vgg", "widths": [8, 16], "in_channels": 1, "timesteps": 2}'


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


@pytest.fixture(scope="module")
def trained(desk: Path) -> dict[str, str]:
    """What is said while a task from outside, then a family from outside go the whole way, each with its plugin."""
    Image.new("RGB", (64, 64)).save(desk / "black.png")
    counting, vgg = ("--plugin", "counting"), ("--plugin", "spiking_vgg_config")
    settings = (VGG, "train.epochs=1", "registry.name=vgg")
    commands = {
        "train count": give("train", "recipe.yaml", "--workers", "1", "--name", "count", *counting),
        "predict version": give("predict", "models:/counter@champion", "black.png", "--json", *counting),
        "predict run": give("predict", "count", "black.png", "--out", "black_counted.png", "--plugin=counting"),
        "train vgg": give("train", "digits", *settings, "--workers", "0", "--name", "vgg", *vgg),
        "show vgg": give("registry", "show", "vgg", "--json"),
        "check vgg": give("spike-check", "vgg", "--measured", "0", *vgg),
        "config vgg": give("config", "show", "digits", VGG, *vgg),
        "config near": give("config", "show", "digits", VGG.replace("widths", "width"), *vgg, code=2),
    }
    return dict(zip(commands, run_commands(desk, list(commands.values())), strict=False))


def test_a_task_from_outside_goes_the_whole_way(desk: Path, trained: dict[str, str]) -> None:
    """Trained by a Ray Train worker."""
    assert "val/exact" in trained["train count"], "the task's own headline is shown"
    assert "counter version 1 is champion" in trained["train count"]
    record = json.loads((desk / "runs" / "count" / "run.json").read_text())
    assert record["plugins"] == ["counting"]
    assert set(record["test"]) == {"exact", "within_one"}
    said = trained["predict version"]
    (answer,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert answer["objects"] in range(8)
    assert (desk / "black_counted.png").stat().st_size > 1000


def test_a_family_from_outside_goes_the_whole_way(trained: dict[str, str]) -> None:
    assert "vgg version 1 is champion" in trained["train vgg"]
    (version,) = json.loads(trained["show vgg"])
    assert version["tags"]["family"] == "spiking_vgg"
    assert version["tags"]["spike_driven"] == "proved"
    assert version["metrics"]["energy_mj"] > 0
    assert "every layer is equal in both forms" in trained["check vgg"]
    assert "spiking_vgg" in trained["config vgg"]
    assert "unknown key 'model.width'; did you mean 'model.widths'?" in trained["config near"]


SERVE = """
import os, mlflow, numpy as np
os.environ["SPIKEFLEET_PLUGINS"] = "spiking_vgg_config"
mlflow.set_tracking_uri("sqlite:///runs/mlflow.db"); mlflow.set_registry_uri("sqlite:///runs/mlflow.db")
print(mlflow.pyfunc.load_model("models:/vgg@champion").predict(np.zeros((2, 1, 8, 8), np.uint8)).shape)
"""


def test_without_its_plugin_it_is_one_sentence_and_the_environment_names_it_too(
    desk: Path, trained: dict[str, str]
) -> None:
    """In a process that starts without plugins, and ends as one that serves."""
    (desk / "broken.py").write_text("raise OSError('no licence')")
    family, task, version, run, broken, evaluated, served = run_commands(
        desk,
        [
            give("config", "show", "digits", VGG, code=2),
            give("train", "recipe.yaml", "--workers", "0", code=2),
            give("evaluate", "models:/counter@champion", code=2),
            give("evaluate", "count", code=2),
            give("recipes", "--plugin", "broken", code=2),
            give("evaluate", "models:/counter@champion", SPIKEFLEET_PLUGINS="counting"),
        ],
        then=SERVE,
    )
    assert "must be one of" in family
    assert "task" in task
    for said in (version, run):
        assert "was trained with plugin counting, which is not loaded; give --plugin counting" in said
        assert "Traceback" not in said
    assert "plugin broken cannot be loaded: OSError: no licence" in broken
    assert "within_one" in evaluated
    assert served.splitlines()[-1:] == ["(2, 10)"]
