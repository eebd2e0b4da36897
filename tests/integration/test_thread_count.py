"""A run resumes with the number of torch's threads that it was trained with, without which its bits would differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from spikefleet import plots
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.training import threads
from spikefleet.training.checkpoints import CheckpointFolder, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Started
from spikefleet.training.loop import train
from spikefleet_pipelines.store.reader import Store
from support.events import KeptEvents
from support.figures import DRAWN, nothing
from support.snapshots import assert_same_end, cut, differences, end_of

# Large enough for torch to split its sums among threads; and in deterministic mode, which does not help.
SETTINGS = [
    "model.width=0.25",
    "model.timesteps=2",
    "train.global_batch=432",
    "train.epochs=1",
    "train.deterministic=true",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
    "cluster.workers=0",
]
EARLY = 2

needs_two_cores = pytest.mark.skipif(threads._cores() < 2, reason="one core has no second thread")


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits")


@pytest.fixture(scope="module")
def config() -> Iterator[Config]:
    yield load_config("digits", parse_overrides(SETTINGS))
    torch.use_deterministic_algorithms(False)


@dataclass
class Trained:
    """What a training said, and how many threads torch had in its steps and after it."""

    notes: list[str]
    recorded: list[int]
    during: set[int]
    after: int


def trained(run_dir: Path, config: Config, store: Store, with_threads: int) -> Trained:
    """Trains or resumes a run in this process, where torch has `with_threads` threads by default."""
    events, during = KeptEvents(), set[int]()

    def before_step(group: ProcessGroup, step: int) -> None:
        during.add(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(with_threads)
    try:
        train(config, store, run_dir, ProcessGroup.single(), events, before_step)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    notes = [text for text in events.notes if "thread" in text]
    recorded = next(event.metadata["threads"] for event in events.seen if isinstance(event, Started))
    return Trained(notes, recorded, during, after)


def put_record(source: Path, into: Path, step: int, recorded: list[int] | None) -> None:
    """The checkpoint of a step as the only one, with another record of threads, or without as in the first release."""
    snapshot = load_checkpoint(CheckpointFolder(source / "checkpoints").at(step))
    state = {key: value for key, value in snapshot.state.items() if key != "threads"}
    if recorded is not None:
        state["threads"] = recorded
    CheckpointFolder(into / "checkpoints").save(step, replace(snapshot, state=state))


@pytest.fixture(scope="module")
def whole(config: Config, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two threads that was never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(plots, name, nothing)
        run_dir = tmp_path_factory.mktemp("whole") / "run"
        first = trained(run_dir, config, store, 2)
    assert first == Trained([], [2], {2}, 2)
    assert end_of(run_dir).state["threads"] == [2]
    return run_dir


@needs_two_cores
def test_resumption_restores_the_number_and_every_bit(
    whole: Path, config: Config, store: Store, tmp_path: Path, no_figures: None
) -> None:
    cut(whole, EARLY, tmp_path / "run")
    resumed = trained(tmp_path / "run", config, store, 1)
    assert resumed.notes == ["torch runs with 2 threads as before, not with 1, so that no bit differs"]
    assert (resumed.recorded, resumed.during) == ([2], {2})
    assert resumed.after == 1, "the process has its own number again"
    assert_same_end(tmp_path / "run", whole)
    # Negative control: without the record, as in the first release, it resumes with this process's number.
    put_record(whole, tmp_path / "earlier", EARLY, None)
    earlier = trained(tmp_path / "earlier", config, store, 1)
    assert earlier == Trained([], [1], {1}, 1)
    found = differences(end_of(tmp_path / "earlier"), end_of(whole))
    assert found[-1] == "state: threads"
    assert any(difference.startswith("model: ") for difference in found)


@needs_two_cores
def test_fewer_cores_are_told_on_one_line(
    whole: Path, config: Config, store: Store, tmp_path: Path, no_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 2)
    put_record(whole, tmp_path / "large", EARLY, [64])
    resumed = trained(tmp_path / "large", config, store, 1)
    assert resumed.notes == [
        "bits will differ from those of an uninterrupted run: rank 0 ran with 64 threads, but has 2 cores here and "
        "runs with 1 thread"
    ]
    assert (resumed.recorded, resumed.during) == ([1], {1})
    assert end_of(tmp_path / "large").state["threads"] == [1], "the record is of what was used"


def test_a_gpu_keeps_the_threads_that_decode_images() -> None:
    gpu, cpu = ProcessGroup(0, 1, torch.device("cuda")), ProcessGroup.single()
    assert torch.get_num_threads() == 1
    assert threads.resume_threads([2], gpu) is None
    assert torch.get_num_threads() == 1
    with threads.restored_thread_count():
        assert threads.resume_threads([1], cpu) is None
        torch.set_num_threads(2)
        assert threads.resume_threads([1], cpu) is not None
        assert torch.get_num_threads() == 1
