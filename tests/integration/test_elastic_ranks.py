"""A training whose number of ranks changes: global batch, coverage of each epoch and learning rate stay."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training.events import StepDone
from spikefleet.training.optimizer import learning_rate
from spikefleet_pipelines.sampling import EpochPlan
from support.ranks import ask_to_stop, kill, run_ranks
from support.snapshots import end_of

# Five steps leave five images: one or two ranks would make a step of them, three would not.
IMAGES, BATCH, STEPS, EPOCHS = 1295, 258, 5, 3
SETTINGS = [
    "model.width=0.125",
    "model.timesteps=1",
    f"train.epochs={EPOCHS}",
    f"train.global_batch={BATCH}",
    "checkpoint.every_steps=1",
    "tracking.every_steps=1",
    "optim.warmup_epochs=1",
]


def write_the_indices(path: Path) -> None:
    """Each rank appends the samples of each step that it begins, with the number of ranks."""
    batches = EpochPlan._batches

    def written(self: EpochPlan, epoch: int, start_step: int) -> Any:
        for batch in batches(self, epoch, start_step):
            line = {"at": [epoch, batch.step], "ranks": self.world_size, "indices": batch.indices.tolist()}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            yield batch

    EpochPlan._batches = written  # type: ignore[method-assign]


def rows_of(path: Path) -> dict[tuple[int, int], dict[int, set[int]]]:
    """Of each step (epoch, step in it), by the number of ranks that began it, the samples of all of them."""
    found: dict[tuple[int, int], dict[int, set[int]]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        epoch, step = line["at"]
        found.setdefault((epoch, step), {}).setdefault(line["ranks"], set()).update(line["indices"])
    return found


def test_ranks_leave_and_join_and_every_image_is_trained_on_once_at_its_learning_rate(
    stores_dir: Path, tmp_path: Path
) -> None:
    config = load_config("digits", parse_overrides([*SETTINGS, "cluster.workers=1:3"]))
    written, run_dir = tmp_path / "indices.jsonl", tmp_path / "run"
    faults = [kill(rank=1, step=3), ask_to_stop(rank=0, step=8)]
    prepare = partial(write_the_indices, written)
    run = run_ranks(config, stores_dir / "digits", run_dir, faults, sizes=[2, 1, 3], prepare=prepare)
    assert run.finished, run.log
    assert run.restarts == 2

    end = end_of(run_dir).state
    sizes = [(size["from_step"], size["workers"]) for size in end["world_sizes"]]
    # The first rank may be ended, with the group, before it has committed the checkpoint of the third step.
    assert sizes in ([(0, 2), (3, 1), (9, 3)], [(0, 2), (2, 1), (9, 3)])
    assert end["steps_per_epoch"] == STEPS
    rows = rows_of(written)
    assert sorted(rows) == [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)]
    whole = {at: max(by_ranks.values(), key=len) for at, by_ranks in rows.items()}
    for at, by_ranks in rows.items():
        assert len(whole[at]) >= BATCH
        for ranks, begun in by_ranks.items():
            # Of a step after the fault, one rank of the group may have read its samples and the other not.
            is_whole = begun == whole[at] or (ranks == 2 and at >= (0, 3) and begun < whole[at])
            assert is_whole, f"{at}: the samples of a step are those of any number of ranks"
    assert {2, 1} <= set(rows[(0, 3)]), "the step that the killed rank did not end was done again"
    for epoch in range(EPOCHS):
        seen = [index for step in range(STEPS) for index in whole[(epoch, step)]]
        assert sorted(seen) == list(range(IMAGES))
    rates = {event.step: event.metrics["lr"] for event in run.events if isinstance(event, StepDone)}
    assert rates == {step + 1: learning_rate(config.optim, step, STEPS, EPOCHS) for step in range(EPOCHS * STEPS)}


@pytest.mark.parametrize(("ranks", "steps"), [(1, STEPS + 1), (2, STEPS + 1), (3, STEPS)])
def test_without_the_largest_number_of_ranks_the_length_of_an_epoch_would_change(ranks: int, steps: int) -> None:
    sizes = {"samples": IMAGES, "global_batch": BATCH, "world_size": ranks}
    assert EpochPlan(**sizes).steps_per_epoch == steps
    assert EpochPlan(**sizes, largest_world=3).steps_per_epoch == STEPS
