"""The form of the spiking unit in a training on the CPU: chosen, agreed by all ranks, recorded, and resumed with."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.training import unit_forms
from spikefleet.training.checkpoints import CheckpointFolder, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink, Started
from spikefleet.training.loop import train
from spikefleet.training.unit_forms import settle_form
from spikefleet_models.families import build_model, model_config
from spikefleet_models.kernels import CHOICE, CpuForm
from spikefleet_models.spiking_unit import SpikingUnit
from spikefleet_pipelines.store.reader import Store
from support.cpu_forms import needs_compiler
from support.events import KeptEvents
from support.ranks import run_ranks
from support.snapshots import assert_same_end, cut, differences, end_of

SETTINGS = [
    "model.width=0.25",
    "train.epochs=1",
    "train.global_batch=256",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=10",
    "tracking.every_steps=1",
    "cluster.workers=0",
]


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits")


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("digits", parse_overrides(SETTINGS))


class Trained(NamedTuple):
    """What a training said of its form, and its losses."""

    kernels: str
    notes: list[str]
    losses: list[float]


def trained(run_dir: Path, config: Config, store: Store) -> Trained:
    events = KeptEvents()
    train(config, store, run_dir, ProcessGroup.single(), events)
    started = next(event for event in events.seen if isinstance(event, Started))
    notes = [text for text in events.notes if "spiking unit" in text]
    return Trained(started.metadata["kernels"], notes, list(events.losses.values()))


@needs_compiler
def test_a_run_keeps_its_form(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    """Resumed, it has the form that it was trained in, whatever the environment says, and with it every bit."""
    whole = {}
    for form in ("native", "lean"):
        monkeypatch.setenv(CHOICE, form)
        whole[form] = trained(tmp_path / form, config, store)
        assert end_of(tmp_path / form).state["kernels"] == form
    native, lean = whole["native"], whole["lean"]
    assert (native.kernels, lean.kernels) == ("native", f"lean ({CHOICE}=lean on {socket.gethostname()})")
    # The same spikes, and gradients that differ in the last bits.
    assert native.losses[0] == lean.losses[0]
    assert native.losses[:3] == pytest.approx(lean.losses[:3], rel=3e-6)
    assert differences(end_of(tmp_path / "native"), end_of(tmp_path / "lean")) != []

    cut(tmp_path / "native", 2, tmp_path / "native again")
    again = trained(tmp_path / "native again", config, store)
    assert (again.kernels, len(again.notes)) == ("native", 1)
    assert again.notes[0].startswith("the spiking unit has its native form as before, not the lean one")
    assert_same_end(tmp_path / "native again", tmp_path / "native")

    monkeypatch.setenv(CHOICE, "native")
    # As in an earlier release, whose checkpoints have no record: it had the lean form alone.
    snapshot = load_checkpoint(CheckpointFolder(tmp_path / "lean/checkpoints").at(2))
    state = {key: value for key, value in snapshot.state.items() if key != "kernels"}
    CheckpointFolder(tmp_path / "earlier/checkpoints").save(2, replace(snapshot, state=state))
    resumed = trained(tmp_path / "earlier", config, store)
    assert resumed.kernels == "lean (as before)"
    assert resumed.notes == [
        "the spiking unit has its lean form as before, not the native one, so that no bit differs; start a new run for "
        "the native one"
    ]
    assert_same_end(tmp_path / "earlier", tmp_path / "lean")


@needs_compiler
def test_two_ranks_train_in_the_native_form(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = load_config("digits", parse_overrides([*SETTINGS, "cluster.workers=2"]))
    run_ranks(two, Path(store.absolute_location), tmp_path / "two", prepare=want_native)
    assert end_of(tmp_path / "two").state["kernels"] == "native"


def want_native() -> None:
    """For a rank."""
    import os

    os.environ[CHOICE] = "native"


class Ranks(ProcessGroup):
    """A group whose other ranks have found something else than this one."""

    others: Sequence[Any] = ()

    def all_gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def group(*others: Any) -> Ranks:
    found = Ranks(0, 1 + len(others), torch.device("cpu"))
    object.__setattr__(found, "others", others)
    return found


def rank(chosen: CpuForm = "native", named: bool = False, flaw: str | None = None) -> Any:
    return unit_forms._Rank(chosen, named, "node-7", flaw)


@needs_compiler
def test_all_ranks_use_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHOICE, raising=False)
    network = build_model(model_config("sg_resnet_tiny"))

    notes = []

    def settled(*others: Any, recorded: CpuForm | None = None) -> tuple[str, bool]:
        events = KeptEvents()
        found = settle_form([network], group(*others), events, recorded)
        assert events.notes == ([] if found.note is None else [found.note])
        forms = {unit.implementation for unit in network.modules() if isinstance(unit, SpikingUnit)}
        assert forms == {found.form}
        notes.append(found.note)
        return found.description, found.note is not None

    assert settled(rank()) == ("native", False)
    assert settled(rank(flaw="no C++ compiler")) == ("lean (no C++ compiler on node-7)", True)
    assert notes[-1].endswith("on node-7; install g++ or clang++ there, or set SPIKEFLEET_KERNELS=lean")
    assert settled(rank("lean", named=True)) == (f"lean ({CHOICE}=lean on node-7)", False)
    assert settled(rank(flaw="no C++ compiler"), recorded="native") == ("lean (no C++ compiler on node-7)", True)
    assert notes[-1].endswith("on node-7; install g++ or clang++ there and resume again")
    assert settled(rank(), recorded="native") == ("native", False)
    assert settled(rank("lean", named=True), recorded="native") == ("native", True)
    assert notes[-1].startswith("the spiking unit has its native form as before, not the lean one")
    assert settled(rank(), recorded="lean") == ("lean (as before)", False)
    assert settled(rank("lean", named=True), recorded="lean") == ("lean (as before)", False)
    assert settled(rank(named=True), recorded="lean") == ("lean (as before)", True)


@pytest.mark.parametrize("broken", ["native_needs_compiling", "native_flaw"])
def test_a_check_that_fails_leaves_no_rank_waiting(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("disk is gone")

    monkeypatch.delenv(CHOICE, raising=False)
    monkeypatch.setattr(unit_forms, broken, fail)
    found = settle_form([], group(), NullSink(), None)
    assert found.form == "lean"
    assert f"its check failed: OSError('disk is gone') on {socket.gethostname()}; install" in str(found.note)


@needs_compiler
@pytest.mark.parametrize("form", [None, "lean"])
def test_the_first_training_says_that_it_compiles(form: CpuForm | None, tmp_path: Path) -> None:
    """With the native form, which a new run has by itself, and once: it takes seconds."""
    environment = {key: value for key, value in os.environ.items() if key != CHOICE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {} if form is None else {CHOICE: form}
    said = "compiling the spiking unit, once for this kind of CPU"
    for expected in ([said], []) if form != "lean" else ([],):
        found = subprocess.run([sys.executable, "-c", _SETTLES], env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout) == {"form": form or "native", "phases": expected}


_SETTLES = """
import json, torch
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.unit_forms import settle_form
from support.events import KeptEvents
events = KeptEvents()
found = settle_form([], ProcessGroup.single(), events, None)
print(json.dumps({"form": found.form, "phases": [event.what for event in events.seen]}))
"""


def test_what_cannot_be_is_refused_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "native")
    monkeypatch.setattr(unit_forms, "native_flaw", lambda: None)
    with pytest.raises(UserError, match=r"SPIKEFLEET_KERNELS=native, but rank 1 cannot use .*: no C.* on node-7; ins"):
        settle_form([], group(rank(flaw="no C++ compiler")), NullSink(), None)
    monkeypatch.setenv(CHOICE, "fast")
    with pytest.raises(UserError, match="SPIKEFLEET_KERNELS is 'fast', expected one of native, lean on "):
        settle_form([], group(rank()), NullSink(), None)
