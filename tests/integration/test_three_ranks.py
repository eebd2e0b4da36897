"""Exact resumption with three ranks, where the order in which gradients are added up matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training import loop
from support.ranks import leave, run_ranks, run_undisturbed
from support.snapshots import cut, differences, end_of

# Above 1 MiB of parameters: DDP then has several buckets, which it arranges anew after its first backward.
SETTINGS = [
    "train.epochs=1",
    "train.global_batch=216",
    "model.timesteps=2",
    "cluster.workers=3",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
]


def leave_the_exchange_unsettled() -> None:
    """What a resumed run would be without the step that is thrown away."""

    def nothing(*arguments: Any) -> None:
        return None

    loop._settle_gradient_exchange = nothing  # type: ignore[assignment]


def test_resumption_with_three_ranks_changes_no_bit(stores_dir: Path, tmp_path: Path) -> None:
    config, store = load_config("digits", parse_overrides(SETTINGS)), stores_dir / "digits"
    run_undisturbed(config, store, tmp_path / "undisturbed")
    end = end_of(tmp_path / "undisturbed")
    stopped = run_ranks(config, store, tmp_path / "stopped", [leave(rank=2, step=3)])
    assert [code[2] for code in stopped.exit_codes] == [9, 0]
    assert differences(end_of(tmp_path / "stopped"), end) == []
    # Without what makes it so, it is not so.
    cut(tmp_path / "undisturbed", 2, tmp_path / "unsettled")
    run_undisturbed(config, store, tmp_path / "unsettled", prepare=leave_the_exchange_unsettled)
    assert any(told.startswith("model: ") for told in differences(end_of(tmp_path / "unsettled"), end))
