"""batch-size, lr-range: what a recipe can be trained with on this machine, before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikefleet.cli.app import app
from spikefleet.cli.output import console, loading, print_json, say, stderr
from spikefleet.cli.parameters import AsJson, Force, OtherData, Overrides, Recipe, StoresDir
from spikefleet.cli.tables import number, print_table
from spikefleet.errors import UserError
from spikefleet.outputs import check_outputs
from spikefleet.status import counting, waiting
from spikefleet_tune.messages import counted

if TYPE_CHECKING:
    from spikefleet.config.schema import Config
    from spikefleet.training.batch_fit import BatchFit
    from spikefleet.training.lr_range import RangeTest
    from spikefleet_pipelines.store.reader import Store

_Gpu = Annotated[bool, typer.Option("--gpu", help="Measure on the GPU.")]


@app.command("batch-size")
def batch_size(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: _Gpu = False,
    data: OtherData = None,
    as_json: AsJson = False,
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """The largest train.global_batch that fits into memory, and the learning rate for it.

    Trains a few steps at growing sizes up to half of the free memory, and puts a line through the peaks.
    """
    config = _config(recipe, overrides)
    with loading("torch", stderr):
        from spikefleet.training.batch_fit import GpuMemory, HostMemory, largest_batch, measure_batches
        from spikefleet.training.distributed import ProcessGroup

    if config.train.stream is not None:
        raise UserError("train.stream: lanes of a stream are not measured; leave it out")
    group = ProcessGroup.single(gpu)
    memory = GpuMemory(group.device) if gpu else HostMemory()
    store = _store(config, data, stores_dir)
    free = memory.free()
    with waiting(stderr, "training steps of growing batches"):
        measured = measure_batches(config, store, memory, group)
    found = largest_batch(config, len(store.samples("train")), measured, free, group.device.type)
    if as_json:
        print_json(found.to_dict())
        return
    _print_batches(config, found, gpu)


def _print_batches(config: Config, found: BatchFit, gpu: bool) -> None:
    rows = [
        (f"{one.batch:,}", f"{one.peak_bytes / 1e6:,.0f}", f"{one.images_per_second:,.0f}") for one in found.measured
    ]
    print_table(console, [number("micro-batch"), number("peak, MB"), number("images/s")], rows)
    say(
        f"{found.bytes_per_sample / 1e6:.3g} MB for each sample and {found.fixed_bytes / 1e6:,.3g} MB beside them; a "
        f"worker has {found.free_bytes / 1e9:,.3g} GB free, of which {found.safe_share:.0%} are used"
    )
    if config.model.is_spiking:
        kept = "bits" if config.train.spike_bits else "numbers"
        say(f"the backward pass has spikes as {kept} (train.spike_bits) and {_recomputed(config)}")
    workers = config.cluster.most_workers
    parts = f"{found.micro_batch:,} x {config.train.accumulate} micro-batches x {workers} workers"
    limit = "all samples of the training split" if found.all_samples else "by memory"
    say(f"largest train.global_batch: {found.global_batch:,} ({parts}; {limit})")
    before = f"train.global_batch={config.train.global_batch} has optim.lr={config.optim.lr:g}"
    rule = "in proportion to the batch" if config.optim.kind == "sgd" else "in proportion to the batch's root"
    if config.train.loss == "sum":
        rule = "as it is, for train.loss=sum"
    where = " --gpu" if gpu else ""
    say(f"learning rate for it: {found.learning_rate:.3g}, {rule} ({before}); spikefleet lr-range{where} tries rates")


def _recomputed(config: Config) -> str:
    """What is recomputed in the backward pass, and what could be."""
    count, there = config.train.recompute, config.model.stage_count
    if count:
        return f"recomputes {counted(count, 'stage')} (train.recompute)"
    return "recomputes nothing" + ("; train.recompute=1 takes less memory and more time" if there else "")


@app.command("lr-range")
def lr_range(
    recipe: Recipe,
    overrides: Overrides = None,
    low: Annotated[float | None, typer.Option(help="First learning rate; optim.lr / 1000 if not given.")] = None,
    high: Annotated[float | None, typer.Option(help="Last learning rate; optim.lr x 100 if not given.")] = None,
    steps: Annotated[int, typer.Option(help="Steps at most.")] = 100,
    gpu: _Gpu = False,
    data: OtherData = None,
    out: Annotated[Path | None, typer.Option(help="File for the plot, a PNG.")] = None,
    force: Force = False,
    as_json: AsJson = False,
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Learning-rate range test: the loss while the rate grows from step to step, and the rate that it suggests."""
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    check_outputs([] if out is None else [out], force=force)
    config = _config(recipe, overrides)
    with loading("torch", stderr):
        from spikefleet.training.distributed import ProcessGroup
        from spikefleet.training.lr_range import range_test

    group = ProcessGroup.single(gpu)
    store = _store(config, data, stores_dir)
    first = config.optim.lr / 1000 if low is None else low
    last = config.optim.lr * 100 if high is None else high
    with counting(stderr, "training with growing rates", "steps") as progress:
        found = range_test(config, store, group, first, last, steps, progress)
    if out is not None:
        from spikefleet import plots

        with waiting(stderr, "drawing the plot"):
            plots.rate_range(found.rates, found.losses, found.smoothed, found.suggested, recipe, out)
    if as_json:
        print_json(found.to_dict())
        return
    _print_range(config, found, out)


def _print_range(config: Config, found: RangeTest, out: Path | None) -> None:
    rows = [
        (f"{found.rates[at]:.3g}", f"{found.losses[at]:.4f}", f"{found.smoothed[at]:.4f}")
        for at in range(0, len(found.rates), max(1, len(found.rates) // 10))
    ]
    print_table(console, [number("learning rate"), number("loss"), number("smoothed")], rows)
    say(f"{found.ended}; the smoothed loss is lowest at {found.lowest:.3g}")
    say(
        f"suggested: optim.lr={found.suggested:.3g}, around which the loss falls fastest over the logarithm of the "
        f"rate (the configuration has {config.optim.lr:g})"
    )
    if out is not None:
        say(f"plot: {out}")


def _config(recipe: str, overrides: list[str] | None) -> Config:
    from spikefleet.config.recipes import load_config, parse_overrides

    return load_config(recipe, parse_overrides(overrides or []))


def _store(config: Config, data: str | None, stores_dir: Path) -> Store:
    from spikefleet.data_access import open_data, store_at

    where = config.data.model_copy(update={"store": store_at(data, stores_dir)}) if data else config.data
    return open_data(where, stores_dir, stderr)
