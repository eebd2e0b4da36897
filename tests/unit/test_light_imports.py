"""What is imported when: configs need pydantic alone, images in memory no store."""

import subprocess
import sys

HEAVY = ("torch", "torchvision", "numpy", "pyarrow", "ray", "sklearn", "PIL")

CONFIGS = """
import json
from spikefleet_pipelines.data_config import DataConfig, store_name
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources import check_options, find_source, list_sources
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig
from spikefleet_pipelines.transforms.kinds import transform_kinds
from spikefleet_pipelines.transforms.normalise_config import NORMALISATIONS

sources = list_sources()
assert len(sources) >= 7, sources
assert all(len(text) > 20 and "\\n" not in text for text in sources.values()), sources
for name in sources:
    config = DataConfig(source=name)
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
    assert store_name(config) == name
    check_options(find_source(name), {})
for kind in transform_kinds():
    for normalise in NORMALISATIONS:
        config = DataConfig(source="digits", transform={"kind": kind, "normalise": normalise})
        assert config.transform.kind == kind
        config.transform.check_images((len(config.transform.normalise.mean), 8, 8))
DetectionTransformConfig(resize="keep_ratio", size=800, longest=1333)
for wrong in ({"source": "digit"}, {"options": {"upsample": 3}}, {"transform": {"cutout": -1}}):
    try:
        DataConfig(**{"source": "digits", **wrong})
    except ValueError:
        continue
    raise AssertionError(wrong)
"""

REPORT = """
import sys
print(*(name for name in {names!r} if name in sys.modules))
"""


def imported(program: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of the modules a program has imported at its end."""
    command = [sys.executable, "-c", program + REPORT.format(names=names)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def test_configs_of_every_source_and_transform_need_pydantic_alone() -> None:
    assert imported(CONFIGS) == []


def test_the_registry_is_searched_without_torch() -> None:
    assert imported("import spikefleet.registry.api", ("torch", "torchvision", "ray", "mlflow", "PIL")) == []


def test_the_check_sees_what_is_imported() -> None:
    program = "import spikefleet_pipelines.opening; from spikefleet_pipelines.sources import find_source\n"
    found = imported(f"{program}find_source('digits').load_reader()")
    assert {"torch", "numpy", "pyarrow", "sklearn"} <= set(found)


def test_images_in_memory_need_no_store() -> None:
    program = """
import numpy as np
from spikefleet_pipelines.in_memory import image_batch
from spikefleet_pipelines.transforms.classification_config import TransformConfig
assert image_batch(np.zeros((2, 1, 8, 8), np.uint8), TransformConfig(), 1).images.shape == (2, 1, 8, 8)
"""
    assert imported(program, ("pyarrow", "sklearn", "ray", "torchvision", "PIL")) == []
