"""The largest batch and the learning-rate range test: what they measure, predict, suggest and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.cli.probing import _print_batches
from spikefleet.config.recipes import load_config
from spikefleet.errors import UserError
from spikefleet.training.batch_fit import (
    HostMemory,
    Measured,
    fit_line,
    growing_sizes,
    largest_batch,
    measure_batches,
    rate_for,
)
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, StepDone
from spikefleet.training.loop import train
from spikefleet.training.lr_range import range_test
from spikefleet_pipelines.store.reader import Store

TINY: dict[str, Any] = {"model.width": 0.125, "model.timesteps": 1, "train.global_batch": 64, "train.epochs": 1}
OVERRIDES = [f"{key}={value}" for key, value in TINY.items()]
MB = 1_000_000


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits")


def test_the_line_through_peaks() -> None:
    assert fit_line([2, 4, 8], [14, 18, 26]) == pytest.approx((2, 10))
    assert fit_line([2, 4], [1, 4]) == pytest.approx((0.9, 0))  # never less than nothing for no sample
    assert fit_line([2, 4], [5, 5]) == pytest.approx((0, 5))
    assert list(growing_sizes(20)) == [2, 4, 8, 16]


def test_the_largest_batch_of_what_was_measured() -> None:
    config = load_config("digits", {"train.accumulate": 2, "cluster.workers": 2})
    measured = [Measured(size, 100 * MB + size * MB, 50.0) for size in (2, 4, 8)]
    found = largest_batch(config, 10_000, measured, 1_000 * MB, "cpu")
    assert (found.micro_batch, found.global_batch, found.all_samples) == (300, 1200, False)  # 0.8 x 500 MB - 100 MB
    assert found.learning_rate == pytest.approx(config.optim.lr * 1200 / 64)
    assert largest_batch(config, 10_000, measured, 1_000 * MB, "cuda").micro_batch == 800  # a GPU for each worker
    few = largest_batch(config, 450, measured, 1_000 * MB, "cpu")
    assert (few.micro_batch, few.global_batch, few.all_samples) == (112, 448, True)
    with pytest.raises(UserError, match="no batch of digits fits into 50,000,000 bytes"):
        largest_batch(config, 10_000, measured, 100 * MB, "cpu")
    assert rate_for(load_config("digits", {"train.loss": "sum"}), 1200) == 0.1
    assert rate_for(load_config("digits", {"optim.kind": "adamw"}), 256) == pytest.approx(0.2)


class LittleMemory(HostMemory):
    """Memory of which a process may take little."""

    def free(self) -> int:
        return 24 * MB


@pytest.mark.slow
def test_no_size_above_half_of_the_memory_is_tried_and_the_line_predicts_a_larger_one(
    store: Store, stores_dir: Path
) -> None:
    little = measure_batches(load_config("digits", TINY), store, LittleMemory(), ProcessGroup.single())
    assert len(little) >= 2
    assert little[-1].batch < 1024  # while all samples are tried where there is memory
    said = CliRunner().invoke(app, ["batch-size", "digits", *OVERRIDES, "--json", "--stores-dir", str(stores_dir)])
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    sizes, peaks = ([one[key] for one in found["measured"]] for key in ("batch", "peak_bytes"))
    assert sizes[-1] == 1024
    assert (found["all_samples"], found["global_batch"]) == (True, len(store.samples("train")))
    slope, fixed = fit_line(sizes[:-1], peaks[:-1])
    assert slope > 0
    assert peaks[-1] == pytest.approx(fixed + slope * 1024, rel=0.35)


class Losses:
    def __init__(self) -> None:
        self.losses: list[float] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.losses.append(event.metrics["train/loss"])


def test_a_range_of_rates_from_the_weights_of_a_training(store: Store, tmp_path: Path, no_figures: None) -> None:
    config, group, losses = load_config("digits", {**TINY, "tracking.every_steps": 1}), ProcessGroup.single(), Losses()
    found = range_test(config, store, group, 1e-4, 10.0, 60)
    assert found.rates[0] == 1e-4
    ratios = [after / before for before, after in zip(found.rates, found.rates[1:], strict=False)]
    assert ratios == pytest.approx([1e5 ** (1 / 59)] * len(ratios))
    assert 1e-4 < found.suggested <= found.lowest
    assert min(found.smoothed) < found.smoothed[0] - 0.1
    train(config, store, tmp_path, group, losses)
    assert found.losses[0] == losses.losses[0]  # the same weights and images
    assert found.losses[-1] != losses.losses[-1]


@pytest.mark.parametrize(
    ("low", "high", "steps", "message"),
    [
        (1.0, 0.1, 50, "learning rates from 1 to 0.1 do not grow; set --low below --high"),
        (0.0, 0.1, 50, "do not grow"),
        (0.1, 1.0, 5, "5 steps are too few for a range of learning rates; set --steps to 20 or more"),
        (1e12, 1e15, 20, "set a smaller --low"),
    ],
)
def test_a_range_without_sense_is_refused(store: Store, low: float, high: float, steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        range_test(load_config("digits", TINY), store, ProcessGroup.single(), low, high, steps)


def test_the_command_draws_and_says_how_the_rate_was_chosen(stores_dir: Path, tmp_path: Path) -> None:
    plot = tmp_path / "range.png"
    words = ["lr-range", "digits", *OVERRIDES, "--steps", "20", "--out", str(plot), "--stores-dir", str(stores_dir)]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "suggested: optim.lr=" in said.stdout
    assert "around which the loss falls fastest" in " ".join(said.stdout.split())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, words).exit_code == 2  # the plot exists


def test_the_batch_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("digits", {"train.accumulate": 2, "cluster.workers": 2})
    measured = [Measured(size, 100 * MB + size * MB, 50.0) for size in (2, 4, 8)]
    _print_batches(config, largest_batch(config, 10_000, measured, 1_000 * MB, "cpu"), gpu=False)
    said = capsys.readouterr().out
    assert "largest train.global_batch: 1,200 (300 x 2 micro-batches x 2 workers; by memory)" in said
    assert "learning rate for it: 1.88, in proportion to the batch (train.global_batch=64 has optim.lr=0.1)" in said
    assert (
        "has spikes as numbers (train.spike_bits) and recomputes nothing; train.recompute=1 takes less memory" in said
    )


def test_what_saves_memory_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    measured = [Measured(size, 100 * MB + size * MB, 50.0) for size in (2, 4, 8)]
    for recipe, overrides, expected in (
        (
            "digits",
            {"train.spike_bits": True, "train.recompute": 2},
            "spikes as bits (train.spike_bits) and recomputes 2",
        ),
        ("saccades_small", {}, "spikes as numbers (train.spike_bits) and recomputes nothing\n"),
    ):
        config = load_config(recipe, overrides)
        _print_batches(config, largest_batch(config, 10_000, measured, 1_000 * MB, "cpu"), gpu=False)
        assert expected in capsys.readouterr().out
