"""How convolutions compute their weight gradients in a training on the CPU: settled, agreed by all ranks, and kept."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.training.checkpoints import CheckpointFolder, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Started
from spikefleet.training.loop import train
from spikefleet.training.weight_gradients import settle_weight_gradients
from spikefleet_models import weight_gradients
from spikefleet_models.weight_gradients import CHOICE, WeightGradients
from spikefleet_pipelines.store.reader import Store
from support.events import KeptEvents
from support.ranks import run_ranks
from support.snapshots import assert_same_end, cut, differences, end_of

SETTINGS = [
    "model.width=0.25",
    "train.epochs=1",
    "train.global_batch=256",
    "train.precision=bf16",
    "train.channels_last=true",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=10",
    "tracking.every_steps=1",
    "cluster.workers=0",
]


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits")


def configured(*overrides: str) -> Config:
    return load_config("digits", parse_overrides([*SETTINGS, *overrides]))


def trained(run_dir: Path, config: Config, store: Store) -> tuple[str, list[float]]:
    """The kernels that the run names, and its losses."""
    events = KeptEvents()
    train(config, store, run_dir, ProcessGroup.single(), events)
    started = next(event for event in events.seen if isinstance(event, Started))
    return started.metadata["kernels"], list(events.losses.values())


def test_a_run_keeps_its_weight_gradients(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    """Resumed, it computes them as before, whatever the CPU and the environment say, and has every bit."""
    kernels, losses = {}, {}
    for form in ("torch", "fp32"):
        monkeypatch.setenv(CHOICE, form)
        kernels[form], losses[form] = trained(tmp_path / form, configured(), store)
        assert end_of(tmp_path / form).state["weight_gradients"] == form
    assert "weight gradients" not in kernels["torch"]
    assert kernels["fp32"] == f"{kernels['torch']}, weight gradients of convolutions in fp32"
    # The same forward pass, and gradients that differ by a rounding.
    assert losses["fp32"][0] == losses["torch"][0]
    assert losses["fp32"][:3] == pytest.approx(losses["torch"][:3], rel=1e-3)
    assert differences(end_of(tmp_path / "fp32"), end_of(tmp_path / "torch")) != []

    monkeypatch.setenv(CHOICE, "torch")
    cut(tmp_path / "fp32", 2, tmp_path / "fp32 again")
    assert trained(tmp_path / "fp32 again", configured(), store)[0] == kernels["fp32"]
    assert_same_end(tmp_path / "fp32 again", tmp_path / "fp32")

    monkeypatch.setenv(CHOICE, "fp32")
    # As before these forms, when checkpoints had no record: torch's own alone.
    snapshot = load_checkpoint(CheckpointFolder(tmp_path / "torch/checkpoints").at(2))
    state = {key: value for key, value in snapshot.state.items() if key != "weight_gradients"}
    CheckpointFolder(tmp_path / "earlier/checkpoints").save(2, replace(snapshot, state=state))
    assert trained(tmp_path / "earlier", configured(), store)[0] == kernels["torch"]
    assert_same_end(tmp_path / "earlier", tmp_path / "torch")


def test_two_ranks_train_with_them(store: Store, tmp_path: Path) -> None:
    two = configured("cluster.workers=2", "train.accumulate=2", "train.spike_bits=true", "train.recompute=2")
    run_ranks(two, Path(store.absolute_location), tmp_path / "two", prepare=want_fp32)
    assert end_of(tmp_path / "two").state["weight_gradients"] == "fp32"


def want_fp32() -> None:
    """For a rank."""
    import os

    from spikefleet_models.weight_gradients import CHOICE

    os.environ[CHOICE] = "fp32"


class Ranks(ProcessGroup):
    """A group whose other ranks have found something else than this one."""

    others: Sequence[Any] = ()

    def all_gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def group(*others: tuple[WeightGradients, str | None]) -> Ranks:
    found = Ranks(0, 1 + len(others), torch.device("cpu"))
    object.__setattr__(found, "others", others)
    return found


def test_all_ranks_use_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "fp32")

    def settled(
        *overrides: str, others: Sequence[tuple[WeightGradients, str | None]] = (), recorded: Any = None
    ) -> WeightGradients:
        conv = nn.Conv2d(16, 16, 3, bias=False)
        form = settle_weight_gradients(conv, configured(*overrides).train, group(*others), recorded)
        assert ("forward" in vars(conv)) == (form != "torch")
        return form

    assert settled() == "fp32"
    assert settled(others=[("fp32", None)]) == "fp32"
    assert settled(others=[("bf16", None)]) == "torch"
    assert settled(others=[("bf16", None)], recorded="bf16") == "bf16"
    assert settled(recorded="torch") == "torch"
    for other in ("train.precision=fp32", "train.channels_last=false", "train.compile=true"):
        assert settled(other) == "torch"
    monkeypatch.delenv(CHOICE)
    monkeypatch.setattr(weight_gradients, "fastest_form", lambda: "bf16")
    assert settled() == "bf16"


def test_an_unknown_form_is_refused_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    train_config = configured().train
    with pytest.raises(UserError, match="nonsense on node-7"):
        settle_weight_gradients(nn.Identity(), train_config, group(("torch", "nonsense on node-7")), None)
    monkeypatch.setenv(CHOICE, "fast")
    message = f"{CHOICE} is 'fast', expected one of torch, bf16, fp32 on {socket.gethostname()}"
    with pytest.raises(UserError, match=message):
        settle_weight_gradients(nn.Identity(), train_config, group(), None)
