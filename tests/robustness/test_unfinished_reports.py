"""A report or certificate that lacks a file is made again; the presence of one file does not stand for the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from spikefleet.certificates.certify import CERTIFICATE, certify
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.files import read_json, write_json
from spikefleet.runs.options import Options
from spikefleet.runs.report import complete_report
from spikefleet.runs.run_dir import Run
from spikefleet.runs.train_run import FinishedRun, run_training
from spikefleet.status import silent
from spikefleet.tasks.task import EVALUATION
from spikefleet_pipelines.store.reader import Store
from support.finished import NAME, SMALL

PARTS = ("spike_check.json", "energy.json", "energy.png", CERTIFICATE, EVALUATION)


def train_again(runs: Path, stores_dir: Path) -> FinishedRun:
    return run_training(
        load_config("digits", parse_overrides(SMALL)), Options(runs, stores_dir), Console(quiet=True), NAME
    )


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_each_part_is_made_again(damage: str, copied: Callable[[], Path], stores_dir: Path) -> None:
    run = Run(copied() / NAME)
    store, config, best = Store.open(stores_dir / "digits", verify=False), run.config(), run.best_checkpoint()
    report = run.path / "report"
    written = {name: (report / name).read_bytes() for name in PARTS}
    for name in ("energy.png", EVALUATION):
        if damage == "missing":
            (report / name).unlink()
        else:
            (report / name).write_bytes(b"")
        certify(config, best, report, store)
        complete_report(config, best, report, store, silent)
        assert (report / name).stat().st_size > 0, name
        if name == EVALUATION:
            assert (report / name).read_bytes() == written[name], name


def test_what_is_whole_is_not_made_again(copied: Callable[[], Path], stores_dir: Path) -> None:
    run = Run(copied() / NAME)
    store, config, best = Store.open(stores_dir / "digits", verify=False), run.config(), run.best_checkpoint()
    before = {name: (run.path / "report" / name).stat().st_mtime_ns for name in PARTS}
    announced: list[str] = []
    certify(config, best, run.path / "report", store, announced.append)
    complete_report(config, best, run.path / "report", store, announced.append)
    assert announced == []
    assert {name: (run.path / "report" / name).stat().st_mtime_ns for name in PARTS} == before


def test_a_finished_run_without_parts_of_its_report_is_registered(copied: Callable[[], Path], stores_dir: Path) -> None:
    """As a Ctrl-C leaves it while the report is drawn."""
    runs = copied()
    run = Run(runs / NAME)
    write_json(run.path / "run.json", {key: value for key, value in run.record().items() if key != "registered"})
    for name in ("energy.png", EVALUATION):
        (run.path / "report" / name).unlink()
    finished = train_again(runs, stores_dir)
    assert finished.promotion is not None
    assert read_json(run.path / "run.json")["registered"] == f"{finished.promotion.name}/{finished.promotion.version}"
