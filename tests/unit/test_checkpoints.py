"""Checkpoints: atomic, verified, pruned; a partial or damaged one is never used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spikefleet.errors import RunError, UserError
from spikefleet.training import checkpoints
from spikefleet.training.checkpoints import (
    CheckpointFolder,
    Snapshot,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
)


def snapshot(value: float = 1.0) -> Snapshot:
    tensors = {"model": {"w": torch.full((3,), value)}, "optimizer": {"w/momentum_buffer": torch.zeros(3)}}
    return Snapshot(
        tensors, {"epoch": 2, "sums": {"loss": 0.1 + 0.2}}, {"model": {"timesteps": 4, "gate_gradient": "literal"}}
    )


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save(7, snapshot())
    assert path.name == "step-00000007"
    back = load_checkpoint(path)
    assert torch.equal(back.tensors["model"]["w"], torch.ones(3))
    assert back.tensors.keys() == {"model", "optimizer"}
    assert back.state == snapshot().state
    assert back.config == snapshot().config


def test_partial_checkpoint_is_never_picked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, snapshot())
    (tmp_path / "step-00000009").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "step-00000009" / "model.safetensors")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(RunError, match=r"step-00000002 cannot be written: .* the disk at .* is full"):
        folder.save(2, snapshot())
    monkeypatch.undo()
    assert folder.latest() == tmp_path / "step-00000001"
    assert not list(tmp_path.glob("partial-*"))


@pytest.mark.parametrize("stage", ["save_file", "write_json", "sync"])
def test_killed_writer_leaves_the_older_checkpoint(stage: str, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, snapshot())
    if (child := os.fork()) == 0:
        setattr(checkpoints, stage, lambda *_, **__: os._exit(9))
        folder.save(2, snapshot())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, "the planned fault did not fire"
    assert folder.latest() == tmp_path / "step-00000001"
    assert list(tmp_path.glob("partial-*"))
    folder.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
    assert folder.save(2, snapshot()).name == "step-00000002"


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_damaged_file_is_named_with_both_hashes(name: str, damage: str, tmp_path: Path) -> None:
    file = CheckpointFolder(tmp_path).save(1, snapshot()) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "remove":
        file.write_bytes({"flip": content, "truncate": content[:-1], "empty": b""}[damage])
    sentence = rf"{name} is damaged: expected SHA-256 [0-9a-f]{{64}}, found .*; remove .*step-00000001"
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(file.parent)


def test_manifest_of_another_format_or_none(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save(1, snapshot())
    manifest = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="expected format 2, found 99"):
        load_checkpoint(path)
    (path / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match=r"checkpoint\.json cannot be read as JSON"):
        load_checkpoint(path)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in range(1, 7):
        folder.save(step, snapshot())
    folder.prune(keep_last=2, keep_steps={3})
    assert [path.name[-1] for path in folder.committed()] == ["3", "5", "6"]
    assert len(list(tmp_path.iterdir())) == 3


def test_optimizer_state_by_name() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters())

    first, second = optimizer(), optimizer()
    network(torch.ones(4, 3)).sum().backward()
    first.step()
    restore_optimizer(second, network, optimizer_tensors(first, network))
    held = second.state_dict()["state"]
    for position, state in first.state_dict()["state"].items():
        assert state.keys() == held[position].keys()
        for key, value in state.items():
            assert torch.equal(value, held[position][key])
