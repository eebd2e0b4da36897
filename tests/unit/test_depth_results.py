"""What `models/README.md` says of gates and side branches over depth follows from the recorded trainings."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

from bench import plot_depth
from spikefleet.reproduction.paired_seeds import PairedSeeds

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/bench/results/depth.jsonl"
README = (ROOT / "models/README.md").read_text()

GATES = {
    **{f"digits of 16x16, 16 epochs, {depth}": f"{{}} @{depth}" for depth in (10, 18, 34)},
    **{f"digits of 16x16, 48 epochs, {depth}": f"48 {{}} @{depth}" for depth in (10, 18, 34)},
    **{f"Fashion-MNIST, 10,000 images, 4 epochs, {depth}": f"fm {{}} @{depth}" for depth in (10, 18, 34)},
    "scenes, small RetinaNet, mAP50, 4 of 22 epochs, 7": "retinanet {}",
    "scenes, small RetinaNet, mAP50, all 22 epochs, 7": "22 retinanet {}",
}
"""Rows of the table of gradients of gates, and the names of their trainings but for the gradient."""

BRANCHES = {
    "none": "none",
    "none; blocks start as the identity": "none, zero init",
    "**losses of all outputs, constant 1**": "losses constant",
    "losses, 1 to 0": "losses evolving from 1",
    "losses, constant 1; start as the identity": "losses constant, zero init",
    "own + summed, constant 1": "own constant",
    "own + summed, 1 to 0": "own evolving from 1",
    "own + summed, detached, constant 1": "detached constant",
    "own + summed, detached, 1 to 0": "detached evolving from 1",
    "summed logits, constant 1 (the paper's)": "summed constant",
    "summed logits, 0.25 to 0 (the paper's, evolutionary)": "summed evolving",
    "losses, convex, constant 0.25": "convex losses constant",
    "losses, convex, 0.25 to 0": "convex losses evolving",
    "summed logits, convex, constant 0.25": "convex constant",
    "summed logits, convex, 0.25 to 0": "convex evolving",
}
"""Rows of the table of side branches, and the names of their trainings but for the depth."""

COLUMNS = ("{} @18", "{} @34", "fm {} @18", "fm {} @34")


def by_seed(name: str, metric: str = "top1") -> dict[int, float]:
    """Per cent of test of the trainings of a name; empty without any."""
    rows = map(json.loads, RESULTS.read_text().splitlines())
    return {row["seed"]: 100 * row["test"][metric] for row in rows if row["name"] == name}


def spread(values: dict[int, float]) -> str:
    return f"{statistics.fmean(values.values()):.1f} ± {statistics.stdev(values.values()):.1f} %"


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    """Mean difference in pairs of equal seeds, with half of its 95 % interval."""
    paired = PairedSeeds.of(first, second)
    assert paired is not None
    assert paired.interval is not None
    return f"{paired.difference:+.1f} ± {(paired.interval[1] - paired.interval[0]) / 2:.1f}"


@pytest.mark.parametrize("row", GATES)
def test_the_table_of_gradients_of_gates(row: str) -> None:
    metric = "map50" if "mAP50" in row else "top1"
    literal, exact = (by_seed(GATES[row].format(gradient), metric) for gradient in ("literal", "exact"))
    assert set(literal) == set(exact)
    better = sum(exact[seed] > literal[seed] for seed in exact)
    said = f"{difference(exact, literal)} ({better} of {len(exact)} better)"
    assert f"| {row} | {len(exact)} | {spread(literal)} | {spread(exact)} | {said} |\n" in README


@pytest.mark.parametrize("row", BRANCHES)
def test_the_table_of_side_branches(row: str) -> None:
    cells = []
    for column in COLUMNS:
        found, plain = by_seed(column.format(BRANCHES[row])), by_seed(column.format("none"))
        assert set(found) in (set(), set(range(5)))
        if not found:
            cells.append("not run")
        elif row == "none":
            cells.append(spread(found))
        else:
            cells.append(f"{spread(found)} ({difference(found, plain)})")
    assert f"| {' | '.join([row, *cells])} |\n" in README


SAID = {
    "* **Part of it is the size of the step**": (
        "convex losses constant @34",
        "convex losses constant, lr 0.4 @34",
        "none, lr 0.4 @34",
        "losses constant, clipped @34",
        "losses constant, warm-up @34",
    ),
    "**The surrogate decides as much as the loss**": ("losses constant, rect @34", "losses constant, dspike @34"),
    "Why do they stand still": ("none, lr 0.01 @34", "none, clipped @34", "none, warm-up @34"),
    "`digits`, 16 epochs with a last batch": ("partial keep", "partial drop", "partial weigh"),
}
"""How paragraphs begin, and the trainings whose mean and deviation they say."""


@pytest.mark.parametrize(("begin", "name"), [(begin, name) for begin, names in SAID.items() for name in names])
def test_what_a_paragraph_says_of_trainings(begin: str, name: str) -> None:
    assert README.count(begin) == 1
    paragraph = re.split(r"\n(?:\* |\n)", README[README.index(begin) :])[0]
    assert spread(by_seed(name)) in " ".join(paragraph.split())


@pytest.mark.parametrize(
    ("better", "other", "says"),
    [
        ("losses constant @34", "detached constant @34", "by {} points to the next kind of loss (detached)"),
        ("fm losses constant @34", "fm own constant @34", "on Fashion-MNIST by {} (own + summed)"),
        ("fm losses constant @34", "fm losses evolving from 1 @34", "{} points with losses of all outputs"),
        ("fm own constant @34", "fm own evolving from 1 @34", "{} with own + summed"),
        ("fm detached constant @34", "fm detached evolving from 1 @34", "{} detached"),
        ("losses constant @18", "losses evolving from 1 @18", "for losses of all outputs ({})"),
        ("fm own constant @18", "fm none @18", "+{} points of own + summed on Fashion-MNIST"),
        ("fm none @18", "fm losses constant @18", "Losses of all outputs cost {} points there"),
    ],
)
def test_what_is_said_of_differences(better: str, other: str, says: str) -> None:
    said = says.format(difference(by_seed(better), by_seed(other)).removeprefix("+"))
    assert said in " ".join(README.split())


def test_branches_at_18_layers_differ_beyond_noise_once_to_the_better() -> None:
    above, differences = [], 0
    for column in ("{} @18", "fm {} @18"):
        for name in set(BRANCHES.values()) - {"none"}:
            if found := by_seed(column.format(name)):
                paired = PairedSeeds.of(found, by_seed(column.format("none")))
                assert paired is not None
                assert paired.interval is not None
                differences += 1
                above += [column.format(name)] if paired.interval[0] > 0 else []
    assert above == ["fm own constant @18"]
    assert f"of {differences} differences to plain networks one is above the noise" in " ".join(README.split())


def test_what_clipping_and_warm_up_are_compared_with() -> None:
    same = {seed: value for seed, value in by_seed("losses constant @34").items() if seed < 3}
    assert README.count(spread(same)) == 2  # of the size of the step, and of the surrogate


def test_the_command_that_draws_accuracy_over_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = re.search(r"^python tests/bench/plot_depth\.py (.+) --out \S+$", README, re.MULTILINE)
    assert command is not None
    picture = tmp_path / "depth.png"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["plot_depth.py", *shlex.split(command.group(1)), "--out", str(picture)])
    plot_depth.main()
    assert picture.stat().st_size > 10_000
