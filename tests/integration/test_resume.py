"""A run whose ranks are killed, freeze or fail gives, bit for bit, what the run that was never disturbed gives."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.training.checkpoints import CheckpointFolder
from spikefleet.training.events import Note
from spikefleet.training.step_reading import NonFiniteError
from support.ranks import GroupRun, fail, freeze, kill, leave, poison_loss, run_ranks, run_undisturbed
from support.snapshots import assert_same_end, cut, differences, end_of

SETTINGS = [
    "model.width=0.125",
    "train.epochs=2",
    "train.global_batch=216",
    "train.ema_decay=0.9",
    "train.clip_norm=1.0",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=9",
    "tracking.every_steps=1",
    "cluster.workers=2",
]
EPOCH, STEPS = 6, 12


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("digits", parse_overrides(SETTINGS))


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Path:
    return stores_dir / "digits"


@pytest.fixture(scope="module")
def undisturbed(config: Config, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GroupRun]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run = run_undisturbed(config, store, run_dir)
    assert sorted(run.losses) == list(range(1, STEPS + 1))
    end = end_of(run_dir)
    assert end.tensors.keys() == {"model", "average", "optimizer", "random"}
    assert (end.state["epoch"], end.state["step_in_epoch"]) == (2, 0)
    return run_dir, run


def test_the_comparison_sees_one_bit_one_number_and_one_name(undisturbed: tuple[Path, GroupRun]) -> None:
    end = end_of(undisturbed[0])
    assert differences(end, end) == []
    for group, tensors in end.tensors.items():
        name = next(name for name, tensor in tensors.items() if tensor.numel())
        bytes_of = tensors[name].clone().reshape(-1).view(torch.uint8)
        bytes_of[0] ^= 1
        other = bytes_of.view(tensors[name].dtype).reshape(tensors[name].shape)
        assert differences(replace(end, tensors={**end.tensors, group: {**tensors, name: other}}), end) == [
            f"{group}: {name}"
        ]
        fewer = {key: tensor for key, tensor in tensors.items() if key != name}
        assert differences(replace(end, tensors={**end.tensors, group: fewer}), end) == [
            f"only in one: {group}: {name}"
        ]
    assert differences(replace(end, state={**end.state, "averaged": -1}), end) == ["state: averaged"]


def test_killed_ranks_change_no_bit(
    config: Config, store: Path, undisturbed: tuple[Path, GroupRun], tmp_path: Path
) -> None:
    """Kills of one run, of either rank: at the first step, after a checkpoint, at an epoch's end, at the last step."""
    reference, clean = undisturbed
    choice = random.Random(1)
    steps = [0, 3, 4, 5, EPOCH, 9, STEPS - 1]
    faults = [kill(rank=choice.randrange(2), step=step) for step in steps]
    assert {fault.rank for fault in faults} == {0, 1}
    run = run_ranks(config, store, tmp_path / "run", faults)
    assert run.finished
    assert run.restarts == len(steps)
    assert run.losses == clean.losses
    best = tmp_path / "run" / "checkpoints" / Path(clean.outcomes[0].best_checkpoint).name
    assert run.outcomes[0] == replace(clean.outcomes[0], best_checkpoint=str(best))
    assert_same_end(tmp_path / "run", reference)


def test_ranks_that_leave_fail_or_freeze_change_no_bit(
    config: Config, store: Path, undisturbed: tuple[Path, GroupRun], tmp_path: Path
) -> None:
    """A rank that stands still for a while is waited for; each other end costs one restart."""
    reference, clean = undisturbed
    faults = [
        leave(rank=0, step=3),
        freeze(rank=1, step=5, wakes=True),
        freeze(rank=0, step=7, wakes=False),
        fail(rank=1, step=10, error=OSError("the disk is away")),
    ]
    run = run_ranks(config, store, tmp_path / "run", faults)
    assert run.finished
    assert run.restarts == 3
    assert run.exit_codes[0][0] == 9
    assert run.exit_codes[1][0] == -9
    assert run.exit_codes[2][1] == 1
    assert run.losses == clean.losses
    assert_same_end(tmp_path / "run", reference)


def test_a_kill_with_adamw_changes_no_bit(store: Path, tmp_path: Path) -> None:
    """Its means of gradients, of their squares and its count of steps are part of the checkpoint."""
    one_epoch = ["train.epochs=1", "cluster.workers=1", "optim.kind=adamw", "optim.lr=0.01"]
    config = load_config("digits", parse_overrides([*SETTINGS, *one_epoch]))
    clean = run_undisturbed(config, store, tmp_path / "clean")
    run = run_ranks(config, store, tmp_path / "run", [kill(rank=0, step=5)])
    assert run.finished
    assert run.restarts == 1
    assert run.losses == clean.losses
    kinds = {name.rpartition("/")[2] for name in end_of(tmp_path / "run").tensors["optimizer"]}
    assert kinds >= {"exp_avg", "exp_avg_sq", "step"}
    assert_same_end(tmp_path / "run", tmp_path / "clean")


def two_threads_on_rank_1() -> None:
    """What a rank on a larger host has by default."""
    torch.set_num_threads(1 + torch.distributed.get_rank())


def test_a_rank_on_a_larger_host_resumes_with_its_number_of_threads(
    config: Config, store: Path, undisturbed: tuple[Path, GroupRun], tmp_path: Path
) -> None:
    cut(undisturbed[0], EPOCH, tmp_path / "run")
    run = run_ranks(config, store, tmp_path / "run", prepare=two_threads_on_rank_1)
    assert run.finished
    notes = [event.text for event in run.events if isinstance(event, Note) and "thread" in event.text]
    assert notes == ["torch runs with 1 thread as before, not with 2, so that no bit differs"]
    assert end_of(tmp_path / "run").state["threads"] == [1, 1]
    assert_same_end(tmp_path / "run", undisturbed[0])
    # Negative control: a run that starts there has, and records, what each rank has.
    fault = kill(rank=1, step=5)
    fresh = run_ranks(config, store, tmp_path / "fresh", [fault], max_failures=0, prepare=two_threads_on_rank_1)
    assert not fresh.finished
    assert end_of(tmp_path / "fresh").state["threads"] == [1, 2]


def test_non_finite_loss_stops_every_rank_before_the_update(
    config: Config, store: Path, undisturbed: tuple[Path, GroupRun], tmp_path: Path
) -> None:
    reference, clean = undisturbed
    run = run_ranks(config, store, tmp_path / "run", [poison_loss(rank=1, step=9)])
    assert not run.restarts, "a restart cannot mend it"
    for error in run.errors:
        assert isinstance(error, NonFiniteError)
        assert str(error).startswith("the loss is nan at step 10 (epoch 2), on rank 1;")
    latest = CheckpointFolder(tmp_path / "run" / "checkpoints").latest()
    assert latest is not None
    assert latest.name == "step-00000008"
    resumed = run_ranks(config, store, tmp_path / "run")
    assert {**run.losses, **resumed.losses} == clean.losses
    assert min(resumed.losses) == 9
    assert_same_end(tmp_path / "run", reference)


def test_what_no_restart_can_heal_ends_the_run(
    config: Config, store: Path, undisturbed: tuple[Path, GroupRun], tmp_path: Path
) -> None:
    """Also when one rank alone meets it, while the others wait for its gradients."""
    cut(undisturbed[0], EPOCH, tmp_path / "run")
    error = UserError("image 7.jpg is truncated; fetch it again")
    run = run_ranks(config, store, tmp_path / "run", [fail(rank=1, step=EPOCH, error=error)])
    assert not run.restarts
    assert str(run.errors[1]) == str(error)
    assert run.exit_codes[0][1] == 1
    assert run.exit_codes[0][0] != 0


def test_a_planned_fault_that_does_not_fire_is_told(
    config: Config, store: Path, undisturbed: tuple[Path, GroupRun], tmp_path: Path
) -> None:
    cut(undisturbed[0], STEPS, tmp_path / "run")
    with pytest.raises(AssertionError, match=rf"did not fire: \['rank 1 at step {STEPS}'\]"):
        run_ranks(config, store, tmp_path / "run", [kill(rank=1, step=STEPS)])
