"""Damaged runs, checkpoints and packages: a sentence, or the checkpoint before it; never a traceback."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spikefleet import registry
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.errors import RunError, UserError
from spikefleet.inference.trained_network import open_trained_network
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import Run
from spikefleet.runs.train_run import run_training
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.tracking.tracker import Tracker
from spikefleet.training import checkpoints
from spikefleet.training.checkpoints import load_checkpoint, verify_checkpoint
from spikefleet.training.event_log import EventReader, EventWriter, new_attempt
from spikefleet.training.events import StepDone
from spikefleet_tune.errors import SearchError
from spikefleet_tune.journal import SearchFolder, TrialRecord
from spikefleet_tune.search_file import search_of
from support.damage import damage_json, damage_text, draws, flip_bit
from support.finished import NAME, SMALL

REFUSALS = (UserError, RunError, SearchError)


def attempt(work: Callable[[], object]) -> str:
    """What came of it: "done", or the sentence. Any other exception is a traceback for the user, and fails the test."""
    try:
        work()
    except REFUSALS as error:
        return str(error)
    return "done"


@pytest.fixture
def run(copied: Callable[[], Path]) -> Run:
    return Run(copied() / NAME)


def newest(run: Run) -> Path:
    latest = run.checkpoints.latest()
    assert latest is not None
    return latest


def sign(checkpoint: Path) -> None:
    """Lists the files of a checkpoint with the hashes that they have now."""
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    signed = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    manifest["manifest_sha256"] = checkpoints._manifest_hash(signed)
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))


def test_each_file_of_a_checkpoint_is_in_its_signed_list(run: Run) -> None:
    checkpoint = newest(run)
    manifest = verify_checkpoint(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == {*manifest["sha256"], "checkpoint.json"}


def test_fuzz_no_flipped_bit_of_a_checkpoint_goes_unnoticed(run: Run) -> None:
    checkpoint = newest(run)
    files = sorted(checkpoint.iterdir())
    for number, draw in enumerate(draws(60)):
        file = files[number % len(files)]
        content = file.read_bytes()
        file.write_bytes(flip_bit(content, draw))
        with pytest.raises(UserError, match=r"damaged|cannot be read as JSON|expected format"):
            load_checkpoint(checkpoint)
        file.write_bytes(content)
    load_checkpoint(checkpoint)


def test_fuzz_a_checkpoint_with_another_state_than_was_written_is_a_sentence(run: Run, stores_dir: Path) -> None:
    """Its hashes fit: what is read is checked by type."""
    checkpoint = newest(run)
    texts = {name: (checkpoint / name).read_bytes() for name in ("state.json", "config.json", "checkpoint.json")}
    told = set()
    for draw in draws(30):
        name = draw.choice(("state.json", "state.json", "config.json"))
        (checkpoint / name).write_bytes(damage_json(texts[name], draw))
        sign(checkpoint)
        told.add(attempt(lambda: run.best_checkpoint()))
        told.add(attempt(lambda: run.begin(run.config(), run.data())))
        told.add(attempt(lambda: open_trained_network(str(checkpoint), run.path.parent)))
        for aside in run.checkpoints.folder.glob("damaged-*"):
            aside.replace(aside.with_name(aside.name.removeprefix("damaged-")))
        for restored, content in texts.items():
            (checkpoint / restored).write_bytes(content)
    assert "done" in told
    assert len(told) > 5


def test_the_checkpoint_before_a_damaged_one_is_used(
    run: Run, stores_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the case of one bit: the training resumes from the one before, to the same end."""
    whole = newest(run)
    record = {**run.record(), "status": "interrupted"}
    (run.path / "run.json").write_text(json.dumps(record))
    text = (whole / "state.json").read_text()
    (whole / "state.json").write_text(text.replace('"best"', '"bast"'))
    config, options = load_config("digits", parse_overrides(SMALL)), Options(run.path.parent, stores_dir)
    finished = run_training(config, options, Console(quiet=True), NAME)
    assert "state.json is damaged" in caplog.text
    assert f"it was set aside as damaged-{whole.name}" in caplog.text
    assert (whole / "state.json").read_text() == text, "the same state, trained again"
    assert dict(finished.test) == record["test"]


def test_nothing_is_used_where_all_are_damaged(run: Run) -> None:
    for path in run.checkpoints.committed():
        (path / "model.safetensors").write_bytes(b"")
    before = sorted(path.name for path in run.checkpoints.folder.iterdir())
    with pytest.raises(UserError, match="no checkpoint before it can be used"):
        run.begin(run.config(), run.data())
    assert sorted(path.name for path in run.checkpoints.folder.iterdir()) == before


def test_other_tensors_are_a_sentence(run: Run) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint, told = newest(run), list[str]()
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        file = checkpoint / name
        content, tensors = file.read_bytes(), load_file(file)
        first = min(tensors)
        for changed in (
            {key: value for key, value in tensors.items() if key != first},
            {**tensors, first: tensors[first].new_zeros(3, 1, 5)},
            {**tensors, "other": tensors[first]},
            {},
        ):
            save_file({key: value.clone() for key, value in changed.items()}, file)
            sign(checkpoint)
            snapshot = load_checkpoint(checkpoint)
            told.append(attempt(lambda snapshot=snapshot: restore(run, snapshot)))  # type: ignore[misc]
        file.write_bytes(content)
    sign(checkpoint)
    assert sum("are not those of its configuration" in sentence for sentence in told) >= 8, told
    assert attempt(lambda: restore(run, load_checkpoint(checkpoint))) == "done"


def restore(run: Run, snapshot: Any) -> None:
    from spikefleet.training.checkpoints import best_network
    from spikefleet.training.distributed import ProcessGroup
    from spikefleet.training.state import TrainingState

    config = run.config()
    best_network(snapshot, config.model)
    state = TrainingState(config, ProcessGroup.single(), run.data().content_hash, snapshot.state["steps_per_epoch"])
    state.restore(snapshot)


def test_fuzz_files_of_a_run(run: Run) -> None:
    files = [
        run.path / name
        for name in (
            "run.json",
            "run.json",
            "config.json",
            "data.json",
            "report/energy.json",
            "tracking.delivered.json",
        )
    ]
    told = set()
    for draw in draws(60):
        file = draw.choice(files)
        content = file.read_bytes()
        file.write_bytes(damage_text(content, draw))
        told.add(attempt(lambda: open_trained_network(NAME, run.path.parent)))
        told.add(attempt(lambda: run.begin(run.config(), run.data())))
        told.add(attempt(lambda: run.note(status="running")))
        file.write_bytes(content)
    assert "done" in told
    assert len(told) > 10


def test_fuzz_journals(run: Run) -> None:
    file = run.path / "tracking.jsonl"
    content = file.read_bytes()
    uri = resolve_tracking_uri(run.path.parent)
    told = set()
    for draw in draws(25):
        lines = content.splitlines(keepends=True)
        number = draw.randrange(len(lines) - 1)
        lines[number] = damage_json(lines[number], draw) + b"\n"
        file.write_bytes(b"".join(lines))
        told.add(attempt(lambda: Tracker.open(run.path, NAME, "digits", uri).finish("FINISHED", wait_s=0)))
        file.write_bytes(content)
    assert any(f"{file}, line " in sentence for sentence in told)


def test_fuzz_packages(copied: Callable[[], Path], tmp_path: Path) -> None:
    uri = resolve_tracking_uri(copied())
    whole = registry.pull("models:/sg_resnet_digits@champion", tmp_path / "whole", tracking_uri=uri)
    told = set()
    for number, draw in enumerate(draws(30)):
        folder = Path(shutil.copytree(whole, tmp_path / f"{number}"))
        file = folder / draw.choice(("card.json", "config.json", "data.json", "energy.json"))
        file.write_bytes(damage_json(file.read_bytes(), draw))
        if file.name != "card.json":  # its hash fits
            card = json.loads((folder / "card.json").read_text())
            card["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            (folder / "card.json").write_text(json.dumps(card))
        told.add(attempt(lambda folder=folder: open_trained_network(str(folder), tmp_path)))  # type: ignore[misc]
        told.add(attempt(lambda folder=folder: registry.load(folder)))  # type: ignore[misc]
        told.add(attempt(lambda folder=folder: registry.describe(folder)))  # type: ignore[misc]
        shutil.rmtree(folder)
    assert "done" in told
    assert len(told) > 10


def test_fuzz_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Damage ends what is shown, and not the run."""
    caplog.set_level("ERROR", logger="spikefleet.training.event_log")  # each damaged file has a warning
    for number, draw in enumerate(draws(30)):
        folder = new_attempt(tmp_path / str(number))
        writer = EventWriter(folder)
        for step in range(4):
            writer.emit(StepDone(0, step, {"train/loss": 1.0}))
        file = next(folder.glob("events-*.jsonl"))
        lines = file.read_bytes().splitlines(keepends=True)
        lines[2] = damage_json(lines[2], draw) + b"\n"
        file.write_bytes(b"".join(lines))
        assert [event.step for event in EventReader(folder).new()][:2] == [0, 1]


def test_fuzz_searches_on_disk(tmp_path: Path) -> None:
    tree = {"recipe": "digits", "space": {"x": {"choice": [0, 1]}}, "objectives": {"gain": "max"}, "sampler": "grid"}
    folder = SearchFolder(tmp_path, "s")
    folder.path.mkdir()
    folder.begin(search_of(tree))
    folder.append("started", number=0, name="s-0000", overrides={"x": 0}, point={"x": 0}, memory={})
    folder.append_record(TrialRecord(0, "s-0000", {"x": 0}, {"x": 0}, {"gain": 1.0}, "finished", 1.5, 0))
    told = set()
    for draw in draws(60):
        file = folder.path / draw.choice(("search.json", "journal.jsonl", "journal.jsonl"))
        content = file.read_bytes()
        if file.name == "search.json":
            file.write_bytes(damage_json(content, draw))
        else:
            lines = content.splitlines(keepends=True)
            number = draw.randrange(len(lines))
            lines[number] = damage_json(lines[number], draw) + b"\n"
            file.write_bytes(b"".join(lines))
        told.add(attempt(folder.read_search))
        told.add(attempt(lambda: [record.values({"gain": "max"}) for record in folder.read().records]))
        file.write_bytes(content)
    assert "done" in told
    assert len(told) > 10
