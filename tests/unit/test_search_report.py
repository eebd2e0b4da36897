"""The report of a search: front table, importance, files and plots."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from spikefleet_tune.importance import METHOD, importance, importance_intervals
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.report import pareto_rows, pareto_table, summary, write_report
from spikefleet_tune.result import SearchResult
from spikefleet_tune.search_file import search_of

_SPACE = {
    "kind": {"choice": ["if", "ilif"]},
    "D": {"choice": [1, 2], "when": {"kind": ["ilif"]}},
    "T": {"choice": [1, 2, 4]},
    "lr": {"log_uniform": [0.001, 0.1]},
}


def _record(number: int, point: dict[str, Any], status: Any = "finished", **figures: float) -> TrialRecord:
    reason = "" if status == "finished" else "=1+1 was the reason"
    return TrialRecord(number, f"s-{number:04d}", point, point, figures, status, 1.0, 0, reason)


def _result(records: list[TrialRecord], **changes: Any) -> SearchResult:
    tree = {
        "recipe": "none",
        "space": _SPACE,
        "objectives": {"acc": "max", "energy": "min"},
        "budget": {"trials": 20},
        **changes,
    }
    return SearchResult("s", Path("unused"), search_of(tree), tuple(records), 36.0, True)


def _many() -> list[TrialRecord]:
    records = []
    for number in range(18):
        T, kind = (1, 2, 4)[number % 3], ("if", "ilif")[number // 3 % 2]
        point = {"kind": kind, "T": T, "lr": 0.001 * (number + 1), **({"D": 1 + number // 9} if kind == "ilif" else {})}
        records.append(_record(number, point, acc=50.0 + 10 * T + 0.01 * number, energy=float(T)))
    return records


def test_front_never_lists_a_dominated_or_unfinished_trial() -> None:
    point = {"kind": "if", "T": 1, "lr": 0.01}
    records = [
        _record(0, point, acc=90.0, energy=5.0),
        _record(1, point, acc=89.0, energy=5.0),  # dominated
        _record(2, point, acc=80.0, energy=1.0),
        _record(3, point, "stopped", acc=70.0, energy=0.5),
        _record(4, point, "pruned", acc=99.0, energy=0.1),
        _record(5, point, "failed"),
        _record(6, point, "stopped", acc=99.0),  # its energy was never reported
        _record(7, point, acc=90.0, energy=5.0),  # equal to the first: both are kept
    ]
    result = _result(records)
    assert [row["trial"] for row in pareto_rows(result)] == ["s-0000", "s-0007", "s-0002", "s-0003"]
    assert [row["trial"] for row in pareto_rows(result) if row["knee"]] == ["s-0002"]
    assert sorted(record.number for record in _result(records[::-1]).front) == [0, 2, 3, 7]  # whatever the order
    curve = result.hypervolume_curve
    assert len(curve) == 8
    assert curve == sorted(curve)
    assert curve[3] == curve[-1]


def test_table_names_every_column_and_marks_the_knee() -> None:
    header, *rows = pareto_table(_result(_many()))
    assert all(header)
    assert header[0] == "trial"
    assert "acc (max)" in header
    assert {len(row) for row in rows} == {len(header)}
    assert [row[-1] for row in rows].count("knee") == 1
    assert any("ilif" in row for row in rows)


def test_importance_finds_what_matters() -> None:
    found = importance(_result(_many()))
    assert isinstance(found["energy"], dict)
    assert next(iter(found["energy"])) == "T"
    assert found["energy"]["T"] > 0.9
    assert "D" not in found["energy"]  # not every trial has it
    assert sum(found["energy"].values()) == pytest.approx(1, abs=0.01)


def test_importance_has_an_interval_that_tells_what_matters_from_chance() -> None:
    result = _result(_many())
    shares, intervals = importance(result)["acc"], importance_intervals(result)["acc"]
    assert isinstance(shares, dict)
    assert intervals.keys() == shares.keys()
    assert all(0 <= low <= high <= 1 for low, high in intervals.values())
    low, high = intervals["T"]
    assert low > 0.5
    assert low < high
    assert intervals["kind"][1] < low  # it decides nothing, and no resample says otherwise
    assert importance_intervals(result)["acc"] == intervals
    assert importance_intervals(_result(_many()[:7])) == {"acc": {}, "energy": {}}
    assert summary(result)["importance_method"] == METHOD


def test_importance_says_why_there_is_none() -> None:
    assert importance(_result(_many()[:7]))["acc"] == "needs 8 trials with values, found 7"
    level = [_record(n, record.point | {}, acc=1.0, energy=float(n)) for n, record in enumerate(_many())]
    assert importance(_result(level))["acc"] == "all trials have the same value"
    same = [_record(n, {"kind": "if", "T": 1, "lr": 0.01}, acc=float(n), energy=1.0) for n in range(9)]
    assert importance(_result(same))["acc"] == "no key that all trials have varies"


def test_files_are_whole(tmp_path: Path) -> None:
    records = [*_many(), _record(18, {"kind": "if", "T": 1, "lr": 0.01}, "failed")]
    result = _result(records)
    paths = write_report(result, tmp_path / "report")
    assert {path.name for path in paths} == {
        "results.json",
        "results.csv",
        "front.png",
        "hypervolume.png",
        "parallel.png",
    }
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size > 5_000
    told = json.loads((tmp_path / "report" / "results.json").read_text())
    assert told == json.loads(json.dumps(summary(result)))
    assert told["counts"] == {"finished": 18, "stopped": 0, "pruned": 0, "failed": 1}
    rows = list(csv.DictReader((tmp_path / "report" / "results.csv").open()))
    assert len(rows) == 19
    assert rows[18]["reason"] == "'=1+1 was the reason"  # no formula for a spreadsheet
    assert rows[0]["D"] == ""
    assert [row["trial"] for row in rows if row["on_front"] == "1"] == sorted(told["front"])
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_report(result, tmp_path / "report")] == before


@pytest.mark.parametrize(
    "records",
    [
        [],
        [_record(0, {"kind": "if", "T": 1, "lr": 0.01}, "failed")],
        [_record(0, {"kind": "if", "T": 1, "lr": 0.01}, acc=1.0, energy=1.0)],
    ],
    ids=["none", "failed", "one"],
)
def test_little_is_reported_too(records: list[TrialRecord], tmp_path: Path) -> None:
    result = _result(records)
    names = {path.name for path in write_report(result, tmp_path)}
    assert {"results.json", "results.csv"} <= names
    assert ("front.png" in names) == bool(result.comparable)
    assert (result.knee is None) == (not result.comparable)


def test_one_objective_or_three_are_drawn_too(tmp_path: Path) -> None:
    one = _result(_many(), objectives={"acc": "max"})
    assert "front.png" not in {path.name for path in write_report(one, tmp_path / "one")}
    assert one.knee is not None
    assert one.knee.metrics["acc"] == max(record.metrics["acc"] for record in one.records)
    three = _result(
        [_record(n, record.point | {}, **record.metrics, time=float(-n)) for n, record in enumerate(_many())],
        objectives={"acc": "max", "energy": "min", "time": "min"},
    )
    assert "front.png" in {path.name for path in write_report(three, tmp_path / "three")}
