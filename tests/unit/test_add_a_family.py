"""The family that models/README.md adds: its code as printed is registered, built, trained a step, deployed, proved."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import nn

from spikefleet_models import (
    AnyModelConfig,
    ModelConfig,
    build_model,
    find_family,
    list_models,
    model_config,
    register_family,
    unregister_family,
)
from spikefleet_models.energy import energy_card
from spikefleet_models.equivalence import check_equivalence
from spikefleet_models.reparam import deploy
from spikefleet_models.shortcut_config import ShortcutConfig

README = Path(__file__).parents[2] / "models" / "README.md"
BLOCK = re.compile(r"^```python\n# (spiking_vgg\w*\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks() -> dict[str, str]:
    return dict(BLOCK.findall(README.read_text()))


def write_modules(folder: Path) -> None:
    for name, code in blocks().items():
        (folder / name).write_text(code)


@pytest.fixture
def vgg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ModelConfig]]:
    write_modules(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = list_models()
    try:
        yield importlib.import_module("spiking_vgg_config").SpikingVGGConfig
    finally:
        unregister_family("spiking_vgg")
        for name in ("spiking_vgg_config", "spiking_vgg"):
            sys.modules.pop(name, None)
    assert list_models() == before


class Section(BaseModel):
    model: AnyModelConfig


def test_it_is_short() -> None:
    code = blocks()
    assert list(code) == ["spiking_vgg_config.py", "spiking_vgg.py"]
    assert sum(bool(line.strip()) for text in code.values() for line in text.splitlines()) < 60


def test_its_configuration_imports_no_torch(tmp_path: Path) -> None:
    write_modules(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import spiking_vgg_config, spikefleet_models; "
        "print(spikefleet_models.model_config('spiking_vgg4').twin().activation, 'torch' in sys.modules); "
        "import spiking_vgg; print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["relu", "False", "True"]


def test_it_is_listed_validated_and_written_whole(vgg: type[ModelConfig]) -> None:
    assert find_family("spiking_vgg") is register_family(vgg) is vgg
    assert list_models("spiking_vgg*") == ["spiking_vgg4", "spiking_vgg3_tiny"]
    config = model_config("spiking_vgg3_tiny", timesteps=2, neuron={"kind": "lif"})
    assert config.tags() == {"task": "classification", "family": "spiking_vgg", "timesteps": 2}
    assert (config.input_multiple, config.simulated_timesteps, config.twin().simulated_timesteps) == (1, 2, 1)
    assert TypeAdapter(AnyModelConfig).validate_json(config.model_dump_json()) == config
    section = Section(model=config)
    assert section.model_dump()["model"] == config.model_dump()
    assert Section.model_validate_json(section.model_dump_json()) == section
    with pytest.raises(ValidationError) as caught:
        Section.model_validate({"model": {"family": "spiking_vgg", "neuron": {"tau": 0.5}, "depth": 3}})
    assert {error["loc"] for error in caught.value.errors()} == {("model", "neuron", "tau"), ("model", "depth")}


def test_what_it_does_not_define_is_refused(vgg: type[ModelConfig]) -> None:
    with pytest.raises(ValueError, match="family=spiking_vgg classifies images"):
        vgg().build_criterion()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="family=spiking_vgg is not one"):
        vgg().branch_channels(ShortcutConfig(where="stage"))  # type: ignore[call-arg]


@pytest.mark.parametrize("neuron", [{"kind": "if"}, {"kind": "plif"}, {"kind": "ilif", "bound": 1}])
def test_it_trains_deploys_and_runs_on_spikes(vgg: type[ModelConfig], neuron: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = build_model(model_config("spiking_vgg3_tiny", neuron=neuron))
    images = torch.rand(4, 1, 16, 16)
    logits = network(images)
    assert logits.shape == (4, 10)
    torch.testing.assert_close(network(images.expand(4, *images.shape)), logits)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())

    network.double().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(0.3)  # far from the initial 1, and every layer fires
    deployed = deploy(network)
    with torch.no_grad():
        assert (deployed(images.double()) - network(images.double())).abs().max() < 1e-12
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    proof = check_equivalence(deployed, images)
    assert proof.passed
    assert {row.name for row in proof.layers if row.kind == "spike-fed"} == {"layers.0.1"}


def test_its_energy_is_compared_with_its_twin(vgg: type[ModelConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, images = build_model(model_config("spiking_vgg3_tiny")), torch.rand(2, 1, 16, 16)
    card = energy_card(network, [images])
    # Stem 16 x 16, one layer 8 x 8, classifier.
    assert card.twin is not None
    assert card.twin.macs == 16 * 16 * 9 * 16 + 8 * 8 * 9 * 16 * 32 + 32 * 10
    assert card.timesteps == 4
    monkeypatch.setattr(vgg, "twin", ModelConfig.twin)
    assert energy_card(network, [images]).twin is None
