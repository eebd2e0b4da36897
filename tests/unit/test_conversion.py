"""`convert`: tensors arrive with our names; a pickle that would run code is refused, and nothing runs or is written."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.conversion import convert_weights, read_tensors
from spikefleet.errors import UserError
from spikefleet_models.families import build_model, model_config


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_state_dict_becomes_safetensors(tmp_path: Path) -> None:
    config = model_config("spike_yolo_tiny")
    state = build_model(config).state_dict()
    for content in (state, {"epoch": 3, "model": state}):
        torch.save(content, tmp_path / "w.pt")
        assert convert_weights(tmp_path / "w.pt", config, tmp_path / "w.safetensors") == len(state)
        found = load_file(tmp_path / "w.safetensors")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())
    torch.save(dict(list(state.items())[1:]), tmp_path / "w.pt")
    with pytest.raises(UserError, match="does not fit"):
        convert_weights(tmp_path / "w.pt", config, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"model": Bomb(marker)}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=r"holds more than plain tensors or is damaged .*torch\.save\(torch\.load"):
        read_tensors(tmp_path / "bomb.pt")
    assert not marker.exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)  # the negative control: the bomb is live
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 3}, "'a' is int, expected a tensor"),
        ([torch.zeros(1)], "holds list, expected a mapping"),
        ({}, "holds dict, expected a mapping"),
    ],
)
def test_other_contents_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(b"no file of torch")
    with pytest.raises(UserError, match="or is damaged"):
        read_tensors(tmp_path / "w.pt")


def test_the_command(tmp_path: Path) -> None:
    torch.save(build_model(model_config("spike_yolo_tiny")).state_dict(), tmp_path / "w.pt")
    words = ["convert", str(tmp_path / "w.pt"), "spike_yolo_tiny", "--out", str(tmp_path / "w.safetensors")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "init.from=" in result.output
    again = CliRunner().invoke(app, words)
    assert again.exit_code != 0  # the file is there
    assert CliRunner().invoke(app, [*words[:2], "spike_yolo_tinny", *words[3:], "--force"]).exit_code != 0
