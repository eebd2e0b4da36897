"""Training and evaluation on streams: membranes stay with their lane, and a resumed run is that without a break."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.inference.event_prediction import predict_recordings
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.tasks import AnyTask
from spikefleet.training.checkpoints import CheckpointFolder, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.evaluation import evaluate
from spikefleet.training.loop import train
from spikefleet.training.splits import prepare_parts
from spikefleet.training.state import TrainingState
from spikefleet.training.step import Meter, training_step
from spikefleet.training.stream import Lanes
from spikefleet_models.carried_state import with_state
from spikefleet_models.families import build_model, model_config
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.stream_plan import NO_FRAME, EventStreamPlan, StreamStep
from spikefleet_pipelines.streams import StreamSamples, recordings_of
from support.event_arrays import random_events
from support.events import KeptEvents
from support.ranks import kill, run_ranks, run_undisturbed
from support.snapshots import assert_same_end, end_of
from support.streams import LENGTHS, SENSOR, WINDOW_US, stream_config, write_box_streams, write_streams


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_streams(tmp_path_factory.mktemp("streams") / "store")


def trained(config: Config, store: Store, run_dir: Path) -> KeptEvents:
    events = KeptEvents()
    train(config, store, run_dir, ProcessGroup.single(), events)
    return events


def parts(config: Config, store: Store) -> tuple[TrainingState, AnyTask, list[Batch]]:
    group = ProcessGroup.single()
    task, splits, plan = prepare_parts(config, store, group)
    state = TrainingState(config, group, "data", plan.steps_per_epoch)
    return state, task, list(splits.train.epoch(plan, 0))


def take(state: TrainingState, task: AnyTask, batch: Batch) -> KeptEvents:
    events = KeptEvents()
    training_step(state, task, batch, Meter(), events)
    return events


def network_and_test(config: Config, store: Store) -> tuple[nn.Module, AnyTask, BatchLoader]:
    torch.manual_seed(0)
    task, splits, _ = prepare_parts(config, store, ProcessGroup.single())
    network = build_model(config.model)
    for module in network.modules():  # so that neurons fire, and remember
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.7)
    return network.eval(), task, splits.test


def answers(config: Config, store: Store) -> list[float]:
    network, task, loader = network_and_test(config, store)
    found = evaluate(network, task, loader, config.train, ProcessGroup.single())
    assert found is not None
    assert found.targets == [number % 3 for number in range(len(LENGTHS))]
    return [prediction.probabilities[0] for prediction in found.predictions]


def test_a_training_on_streams_ends_with_its_report(store: Store, tmp_path: Path) -> None:
    config = stream_config(train__ema_decay=0.9)
    events = trained(config, store, tmp_path / "run")
    steps = prepare_parts(config, store, ProcessGroup.single())[2].steps_per_epoch
    assert max(events.losses) <= 2 * steps
    assert (tmp_path / "run" / "report" / "evaluation.json").is_file()
    end = end_of(tmp_path / "run")
    assert "carried" not in end.tensors
    assert (end.state["epoch"], end.state["step_in_epoch"]) == (2, 0)
    assert 0 < end.state["history"][0]["train/loss"] < 3


def test_only_labelled_windows_are_in_the_loss(store: Store) -> None:
    state, task, batches = parts(stream_config(train__global_batch=4), store)
    carried, moved = None, 0
    for batch in batches:
        assert batch.stream is not None
        starts, labelled = torch.from_numpy(batch.stream.starts), batch.stream.frame_index != NO_FRAME
        before = None if carried is None else carried.restart(starts).detach()
        state.network.train()
        statistics = {name: buffer.clone() for name, buffer in state.network.named_buffers()}
        with torch.no_grad():
            logits, carried = with_state(state.network, batch.network_input, before)
        for name, buffer in state.network.named_buffers():
            buffer.copy_(statistics[name])
        weights = [parameter.detach().clone() for parameter in state.network.parameters()]
        events = take(state, task, batch)
        same = all(torch.equal(old, new) for old, new in zip(weights, state.network.parameters(), strict=True))
        assert same == (not labelled.any())
        moved += same
        if labelled.any():
            expected = F.cross_entropy(logits[labelled], batch.targets[labelled])  # type: ignore[index]
            assert events.losses[state.step] == pytest.approx(expected.item(), rel=1e-5)
    assert state.step == len(batches)
    assert moved, "a step without labels is part of the test"


def test_frozen_statistics_stay_in_steps_without_labels(store: Store) -> None:
    state, task, batches = parts(stream_config(train__global_batch=4, train__freeze=["stem"]), store)
    kept: dict[str, bool] = {}
    others: dict[str, bool] = {}
    unlabelled = 0
    for batch in batches:
        assert batch.stream is not None
        if (batch.stream.frame_index != NO_FRAME).any():
            continue
        unlabelled += 1
        means = {name: one.clone() for name, one in state.network.named_buffers() if name.endswith("running_mean")}
        take(state, task, batch)
        moved = {name: not torch.equal(one, dict(state.network.named_buffers())[name]) for name, one in means.items()}
        kept |= {name: was for name, was in moved.items() if name.startswith("stem")}
        others |= {name: was for name, was in moved.items() if not name.startswith("stem")}
    assert unlabelled
    assert kept
    assert not any(kept.values())
    assert all(others.values()), "the others are moved on"


def test_random_windows_beside_streams_start_fresh(store: Store) -> None:
    state, task, batches = parts(stream_config(train__stream={"mix": 0.5}), store)
    for batch in batches[:3]:
        assert batch.stream is not None
        assert batch.stream.starts[[1, 3]].all()
        assert batch.global_count >= 2
        take(state, task, batch)
    carried = state.lanes.tensors(ProcessGroup.single())
    assert {v.shape[0] for v in carried.values()} == {4}
    assert all(math.isfinite(v.sum()) for v in carried.values())


def test_a_restored_state_takes_the_step_that_the_saved_one_takes(store: Store) -> None:
    config = stream_config()
    state, task, batches = parts(config, store)
    middle = next(n for n, batch in enumerate(batches) if n and batch.stream and not batch.stream.starts.all())
    for batch in batches[:middle]:
        take(state, task, batch)
    snapshot = copy.deepcopy(state.snapshot())  # its tensors are those of the state
    assert "stem.unit.neuron" in snapshot.tensors["carried"]
    rest = batches[middle : middle + 3]
    assert any(batch.global_count for batch in rest)
    losses = [_losses(state, task, rest)]
    for forgets in (False, True):
        again, _, _ = parts(config, store)
        again.restore(snapshot)
        if forgets:  # negative control
            again.lanes.clear()
        losses.append(_losses(again, task, rest))
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def _losses(state: TrainingState, task: AnyTask, batches: list[Batch]) -> dict[int, float]:
    found: dict[int, float] = {}
    for batch in batches:
        found |= take(state, task, batch).losses
    return found


def test_killed_ranks_resume_in_the_middle_of_recordings(store: Store, tmp_path: Path) -> None:
    config = stream_config(train__epochs=1, cluster__workers=2, checkpoint__every_steps=1, checkpoint__keep_last=99)
    path = Path(store.location)
    windows = StreamSamples(recordings_of(store.samples("train")), WINDOW_US).windows
    ranks = (EventStreamPlan(windows=windows, lanes=4, world_size=2, rank=rank).batches(0) for rank in range(2))
    labels = [tuple(int((part.frame_index != NO_FRAME).any()) for part in step) for step in zip(*ranks, strict=True)]
    assert {(0, 1), (1, 0)} & {*labels}, "a step in which one rank has no label is part of the test"
    clean = run_undisturbed(config, path, tmp_path / "clean")
    folder = CheckpointFolder(tmp_path / "clean" / "checkpoints")
    inside = [load_checkpoint(one) for one in folder.committed()]
    assert any("carried" in one.tensors and next(iter(one.tensors["carried"].values())).shape[0] == 4 for one in inside)
    run = run_ranks(config, path, tmp_path / "run", [kill(rank=1, step=3)])
    assert run.finished
    assert run.restarts == 1
    assert run.losses == clean.losses
    assert_same_end(tmp_path / "run", tmp_path / "clean")


def test_a_checkpoint_without_its_membranes_is_refused(store: Store) -> None:
    config = stream_config()
    state, task, batches = parts(config, store)
    take(state, task, batches[0])
    snapshot = state.snapshot()
    lost = {name: v for name, v in snapshot.tensors["carried"].items() if "stem" not in name}
    again, _, _ = parts(config, store)
    with pytest.raises(UserError, match=r"layer 'stem\.unit\.neuron' of neurons, the carried state has not"):
        again.restore(type(snapshot)({**snapshot.tensors, "carried": lost}, snapshot.state, snapshot.config))


def test_evaluation_reads_each_recording_alone(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording full of events leaves no trace in those that follow it in its lane."""
    loud = {
        number: random_events(60_000 * windows, SENSOR, WINDOW_US * windows) for number, windows in ((1, 4), (4, 5))
    }
    poisoned = write_streams(tmp_path / "store", loud)
    for eval_batch in (1, 2, 16):
        config = stream_config(train__eval_batch=eval_batch)
        ours, theirs = np.array(answers(config, store)), np.array(answers(config, poisoned))
        others = np.setdiff1d(np.arange(len(LENGTHS)), [*loud])
        np.testing.assert_allclose(ours[others], theirs[others], rtol=1e-6)
        assert (ours[[*loud]] != theirs[[*loud]]).all()
    # Negative control: lanes that never start anew carry the poison on.
    monkeypatch.setattr(StreamStep, "starts", property(lambda step: np.zeros(len(step.lane), bool)))
    config = stream_config(train__eval_batch=1)
    ours, theirs = np.array(answers(config, store)), np.array(answers(config, poisoned))
    assert not np.allclose(ours[others], theirs[others], rtol=1e-6)


def test_evaluation_carries_the_state_up_to_the_label(store: Store) -> None:
    config = stream_config()
    network, _, loader = network_and_test(config, store)
    expected = []
    samples = store.samples("test")
    for row, windows in enumerate(LENGTHS):
        state, logits = None, torch.empty(0)
        frames = loader.config.model_copy(update={"window": f"{10 * windows}ms"}).for_timesteps(3 * windows)
        batch = frames.build(samples, train=False, seed=0)(np.array([row]), 0)[0]
        for window in batch.transpose(0, 1).split(3):
            with torch.no_grad():
                logits, state = with_state(network, window, state)
        expected.append(logits.softmax(1).max().item())
    np.testing.assert_allclose(answers(config, store), expected, rtol=1e-5)
    reset = answers(stream_config(train__stream={"state": "reset"}), store)
    assert np.abs(np.array(reset) - expected)[np.array(LENGTHS) > 1].max() > 1e-3
    once = np.array(LENGTHS) == 1
    np.testing.assert_allclose(np.array(reset)[once], np.array(expected)[once], rtol=1e-5)


def test_detectors_train_on_streams(tmp_path: Path) -> None:
    store = write_box_streams(tmp_path / "store")
    detector = model_config("spike_yolo_tiny", in_channels=2, num_classes=2, timesteps=2).model_dump()
    config = stream_config(
        task="detection",
        model=detector,
        data={"source": "gen1", "transform": {"kind": "event_detection", "window": "50ms", "horizontal_flip": 0.5}},
        train__global_batch=2,
        checkpoint__metric="map50",
    )
    state, task, batches = parts(config, store)
    assert {batch.global_count for batch in batches} == {0, 2}
    for batch in batches:
        before = [parameter.detach().clone() for parameter in state.network.parameters()]
        take(state, task, batch)
        moved = any(not torch.equal(a, b) for a, b in zip(before, state.network.parameters(), strict=True))
        assert moved == (batch.global_count > 0)
    loader = prepare_parts(config, store, ProcessGroup.single())[1].test
    found = evaluate(state.network, task, loader, config.train, ProcessGroup.single())
    assert found is not None
    assert [len(target.boxes) for target in found.targets] == [2, 1, 1] * 3
    assert 0 <= task.metrics(found.predictions, found.targets)["map50"] <= 1


def test_prediction_of_a_stream_goes_on_from_window_to_window(store: Store) -> None:
    config = stream_config()
    network, _, _ = network_and_test(config, store)
    trained = TrainedNetwork("mine", network, config, DataSummary.of(store.manifest))
    path = Path(store.location)
    done = predict_recordings(trained, [path], window="10ms", stream=True)
    assert not done.bad
    last: dict[str, float] = {one["recording"]: one["classes"][0]["probability"] for one in done.answers}
    np.testing.assert_allclose(list(last.values()), answers(config, store), rtol=1e-5)
    alone = predict_recordings(trained, [path], window="10ms")
    assert len(alone.answers) == len(done.answers) == sum(LENGTHS)
    same = [one["classes"] == other["classes"] for one, other in zip(alone.answers, done.answers, strict=True)]
    starts = np.cumsum([0, *LENGTHS])[:-1]
    assert all(same[start] for start in starts)
    assert not all(same)
    with pytest.raises(UserError, match="add their length, such as --window"):
        predict_recordings(trained, [path], stream=True)
    with pytest.raises(UserError, match="mine has no spiking neurons"):
        predict_recordings(dataclasses.replace(trained, network=nn.ReLU()), [path], window="10ms", stream=True)


def test_what_cannot_be_read_as_a_stream_is_refused(store: Store) -> None:
    config = stream_config()
    network, task, _ = network_and_test(config, store)
    shuffled = config.transform.model_copy(update={"slice_order": "shuffled"})
    loader = BatchLoader(store.samples("test"), shuffled, train=False)
    with pytest.raises(UserError, match=r"trained on streams \(train.stream\): slice_order=shuffled changes"):
        evaluate(network, task, loader, config.train, ProcessGroup.single())


def test_lanes_of_a_network_without_neurons_are_refused() -> None:
    with pytest.raises(ValueError, match="no spiking neurons"), Lanes(carries=True).window(nn.ReLU(), _no_batch()):
        pass


def _no_batch() -> Batch:
    none = np.zeros(1, np.int64)
    step = StreamStep(0, none, np.ones(1, bool), none, none, 1)
    return Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), 1, step)
