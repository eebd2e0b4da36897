"""The registry of families: open, strict about names, torch-free; what configurations say of their members."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import nn

import spikefleet_models
from spikefleet_models import (
    AnyModelConfig,
    ModelConfig,
    find_family,
    list_models,
    model_config,
    register_family,
    unregister_family,
)
from spikefleet_models.sg_resnet_config import SGResNetConfig
from spikefleet_models.shortcut_config import ShortcutConfig

PACKAGE = Path(spikefleet_models.__path__[0])
CONFIGS = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*config.py"))
SG = {"task": "classification", "family": "sg_resnet", "timesteps": 4, "connection": "bsg", "decoder": "asd"}
SG |= {"neuron": "if"}
YOLO = {"task": "detection", "family": "spike_yolo", "timesteps": 1, "activation": "spiking"}
YOLO |= {"neuron": "ilif", "bound": 4}
RATE = {**SG, "decoder": "rate"}
SEW = {**RATE, "connection": "add"}
SPIKING = {**RATE, "connection": "post_add"}
ANN = {**RATE, "connection": "ann", "timesteps": 1}
SEVEN = {**SG, "family": "seven_b_net", "timesteps": 16, "neuron": "plif"}
SMALL_EVENTS = {"task": "classification", "family": "small_event_net", "timesteps": 16, "decoder": "rate"}
SMALL_EVENTS |= {"neuron": "plif"}
RETINA = {"task": "detection", "family": "retinanet"}
TAGS: dict[str, dict[str, object]] = {
    "sg_resnet10": SG,
    "sg_resnet18": SG,
    "sg_resnet34": SG,
    "sg_resnet50": RATE,
    "sg_resnet_tiny": SG,
    "sew_resnet18": SEW,
    "sew_resnet34": SEW,
    "sew_resnet50": SEW,
    "spiking_resnet18": SPIKING,
    "spiking_resnet34": SPIKING,
    "resnet18": ANN,
    "resnet34": ANN,
    "resnet50": ANN,
    "spike_yolo_n": YOLO,
    "spike_yolo_s": YOLO,
    "spike_yolo_m": YOLO,
    "spike_yolo_l": YOLO,
    "spike_yolo_tiny": YOLO,
    "spike_yolo_ann_s": {**YOLO, "activation": "relu"},
    "spike_yolo_ann_tiny": {**YOLO, "activation": "relu"},
    "spike_yolo_s_no_rep": YOLO,
    "spike_yolo_s_block2": YOLO,
    "spike_yolo_s_transformer": YOLO,
    "spike_yolo_s_anchor": YOLO,
    "spiking_yolov8_m": {**YOLO, "family": "spiking_yolov8"},
    "retinanet_sg_resnet18": {**SG, **RETINA},
    "retinanet_sg_resnet34": {**SG, **RETINA},
    "retinanet_resnet18": {**ANN, **RETINA},
    "retinanet_resnet34": {**ANN, **RETINA},
    "retinanet_tiny": {**SG, **RETINA},
    "seven_b_net_wide": SEVEN,
    "seven_b_net_narrow": SEVEN,
    "sew_seven_b_net_wide": {**SEVEN, "connection": "add", "decoder": "rate"},
    "small_event_net": SMALL_EVENTS,
    "small_event_net_weighted": {**SMALL_EVENTS, "decoder": "weighted"},
}
"""Of every member, in the order of the list."""


class Plain(ModelConfig):
    task: ClassVar[str] = "segmentation"
    family: Literal["plain"] = "plain"
    timesteps: int = 1
    in_channels: int = 3
    num_classes: int = 10

    def build(self) -> nn.Module:
        return nn.Linear(self.in_channels, self.num_classes)


class Nested(BaseModel):
    models: list[AnyModelConfig]


@pytest.fixture
def plain() -> Iterator[type[Plain]]:
    yield register_family(Plain)
    unregister_family("plain")


def loaded_by(code: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after `code`."""
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {"torch", "torchvision", "spikingjelly", "numpy"} & set(ran.stdout.split())


def test_configurations_import_no_torch() -> None:
    assert {"sg_resnet_config", "retinanet_config", "spike_yolo.config", "neuron_config"} < set(CONFIGS)
    imports = "\n".join(f"import spikefleet_models.{name}" for name in CONFIGS)
    uses = """
from spikefleet_models import AnyModelConfig, list_models, model_config
from pydantic import TypeAdapter
for name in list_models():
    config = model_config(name, num_classes=7)
    assert TypeAdapter(AnyModelConfig).validate_json(config.model_dump_json()) == config
    config.twin(), config.tags(), config.input_multiple, config.simulated_timesteps
"""
    assert loaded_by(f"{imports}\n{uses}") == set()
    assert "torch" in loaded_by(f"{uses}\nmodel_config('sg_resnet_tiny').build()")


def test_the_package_offers_names_without_loading_them() -> None:
    assert set(spikefleet_models.__all__) <= set(dir(spikefleet_models))
    assert loaded_by("import spikefleet_models; assert 'pydantic' not in sys.modules") == set()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spikefleet_models.nothing


def test_members_and_their_tags_are_as_pinned() -> None:
    assert list_models() == list(TAGS)
    assert {name: model_config(name).tags() for name in list_models()} == TAGS


@pytest.mark.parametrize(
    ("name", "multiple"), [("sg_resnet18", 1), ("retinanet_tiny", 1), ("spike_yolo_s", 32), ("spike_yolo_tiny", 16)]
)
def test_sides_of_images(name: str, multiple: int) -> None:
    assert model_config(name).input_multiple == multiple


@pytest.mark.parametrize("name", list_models())
def test_the_twin_is_the_same_without_spikes(name: str) -> None:
    config = model_config(name)
    twin = config.twin()
    assert type(twin) is type(config)
    assert twin.twin() == twin
    assert (twin.is_spiking, twin.simulated_timesteps) == (False, 1)
    assert (twin == config) == (not config.is_spiking)
    different = {key for key, value in twin.model_dump().items() if value != config.model_dump()[key]}
    assert different <= {"connection", "activation", "backbone"}


def test_side_branches_are_a_matter_of_the_family() -> None:
    config, block = model_config("sg_resnet34"), ShortcutConfig(where="block")
    assert config.branch_channels(ShortcutConfig(where="stage")) == [64, 128, 256]
    assert config.branch_channels(block) == [64] * 3 + [128] * 4 + [256] * 6 + [512] * 2
    assert model_config("seven_b_net_wide").branch_channels(ShortcutConfig(where="stage")) == [64]
    assert model_config("seven_b_net_narrow").branch_channels(block) == [32] * 6
    with pytest.raises(ValueError, match="only one stage"):
        model_config("sg_resnet18", stages=(2,)).branch_channels(ShortcutConfig(where="stage"))
    for name in ("retinanet_tiny", "spike_yolo_tiny"):
        with pytest.raises(ValueError, match=f"family={model_config(name).family} is not one"):
            model_config(name).branch_channels(block)


def test_a_family_from_outside_joins_and_leaves(plain: type[Plain]) -> None:
    assert register_family(plain) is find_family("plain") is plain
    nested = Nested.model_validate({"models": [{"family": "plain", "num_classes": 3}, {"stages": [1]}]})
    assert [type(config) for config in nested.models] == [Plain, SGResNetConfig]
    assert nested.model_dump()["models"][0] == {"family": "plain", "timesteps": 1, "in_channels": 3, "num_classes": 3}
    assert Nested.model_validate_json(nested.model_dump_json()) == nested
    assert nested.models[0].twin() is None
    with pytest.raises(ValueError, match="family=plain has no detection criterion; its task is segmentation"):
        nested.models[0].build_criterion()
    unregister_family("plain")
    with pytest.raises(ValueError, match="unknown family 'plain', expected one of sg_resnet, "):
        find_family("plain")
    with pytest.raises(ValidationError, match="family must be one of sg_resnet, spike_yolo"):
        Nested.model_validate(nested.model_dump())
    with pytest.raises(ValidationError, match="family must be one of sg_resnet, spike_yolo"):
        Nested(models=nested.models)
    register_family(plain)


def test_a_family_has_one_class(plain: type[Plain]) -> None:
    class Other(Plain):
        pass

    with pytest.raises(
        ValueError, match=r"family=plain of \S+Other is already registered by \S+Plain; choose another name"
    ):
        register_family(Other)
    assert find_family("plain") is plain


def test_a_member_has_one_family() -> None:
    class Taken(Plain):
        presets: ClassVar[dict[str, dict[str, Any]]] = {"mine": {}, "resnet18": {}}
        family: Literal["taken"] = "taken"  # type: ignore[assignment]

    with pytest.raises(ValueError, match="model 'resnet18' of family=taken is already a member of family=sg_resnet"):
        register_family(Taken)
    assert "mine" not in list_models()
    with pytest.raises(ValueError, match="unknown family 'taken'"):
        find_family("taken")


def test_what_is_no_family_is_refused() -> None:
    class Half(ModelConfig):
        timesteps: int = 1

    with pytest.raises(ValueError, match="lacks a default for family, task, in_channels, num_classes"):
        register_family(Half)
    with pytest.raises(ValueError, match="unknown family"):
        unregister_family("half")


@pytest.mark.parametrize(
    ("value", "locations"),
    [
        ({"timestep": 2}, [("models", 0, "timestep")]),
        ({"family": "spike_yolo", "neuron": {"bound": 0}}, [("models", 0, "neuron", "bound")]),
        (
            {"family": "retinanet", "backbone": {"x": 1}, "taps": 0},
            [("models", 0, "backbone", "x"), ("models", 0, "taps")],
        ),
        ({"family": ["sg_resnet"]}, [("models", 0)]),
        ("sg_resnet18", [("models", 0)]),
    ],
)
def test_errors_name_fields_and_nothing_else(value: object, locations: list[tuple[object, ...]]) -> None:
    with pytest.raises(ValidationError) as caught:
        Nested.model_validate({"models": [value]})
    assert [error["loc"] for error in caught.value.errors()] == locations


def test_errors_of_a_lone_configuration_have_no_prefix() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(AnyModelConfig).validate_python({"stages": [0]})
    assert [error["loc"] for error in caught.value.errors()] == [()]
    assert "every stage must have at least 1 block" in str(caught.value)


def test_the_bins_of_a_box_are_counted_once() -> None:
    defined = [
        path.name for path in PACKAGE.rglob("*.py") if re.search(r"^REG_MAX\b.*=", path.read_text(), re.MULTILINE)
    ]
    assert defined == ["config.py"]
