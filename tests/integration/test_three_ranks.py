"""Exact resumption with three ranks, where the order in which gradients are added up matters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training.checkpoints import load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train
from spikefleet_pipelines.store.reader import Store

RANKS = 3
# Above 1 MiB of parameters: DDP then has several buckets, which it arranges anew after its first backward.
SETTINGS = ["train.epochs=1", "train.global_batch=96", "cluster.workers=3", "checkpoint.every_steps=4"]


def rank_process(rank: int, rendezvous: str, store: Path, run_dir: Path, stop_at: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)

    def before_step(group: ProcessGroup, step: int) -> None:
        if step == stop_at:
            os._exit(9)

    group = ProcessGroup(rank, RANKS, torch.device("cpu"))
    train(
        load_config("digits", parse_overrides(SETTINGS)),
        Store.open(store, verify=False),
        run_dir,
        group,
        NullSink(),
        before_step,
    )
    dist.destroy_process_group()


def run(store: Path, run_dir: Path, stop_at: int | None = None) -> list[int]:
    """Exit codes of the ranks, each a process that runs this file."""
    rest = [f"file://{run_dir}-rendezvous-{stop_at}", str(store), str(run_dir), str(stop_at)]
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), *rest]) for rank in range(RANKS)]
    return [process.wait() for process in processes]


def test_resumption_with_three_ranks_changes_no_bit(stores_dir: Path, tmp_path: Path) -> None:
    store = stores_dir / "digits"
    assert run(store, tmp_path / "undisturbed") == [0] * RANKS
    codes = run(store, tmp_path / "stopped", stop_at=6)
    assert 9 in codes, "the planned fault did not fire"
    assert 0 not in codes  # a rank may also die of the exit of another
    assert run(store, tmp_path / "stopped") == [0] * RANKS
    ends = [load_checkpoint(tmp_path / name / "checkpoints" / "step-00000014") for name in ("undisturbed", "stopped")]
    for group in ("model", "optimizer"):
        for name, tensor in ends[0].tensors[group].items():
            assert torch.equal(tensor, ends[1].tensors[group][name]), f"{group}: {name}"


if __name__ == "__main__":
    _, rank, rendezvous, store, run_dir, stop_at = sys.argv
    rank_process(int(rank), rendezvous, Path(store), Path(run_dir), None if stop_at == "None" else int(stop_at))
