"""The durable record of a search: torn lines, one attempt at a time, and what may change under a name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from spikefleet_tune.errors import SearchError
from spikefleet_tune.journal import Past, SearchFolder, TrialRecord, WarmStartPoint
from spikefleet_tune.search import read_search_result
from spikefleet_tune.search_file import search_of


def _tree(**changes: Any) -> dict[str, Any]:
    space = {"a": {"choice": [1, 2]}}
    return {"recipe": "digits", "space": space, "objectives": {"gain": "max"}, "budget": {"trials": 3}, **changes}


def _record(number: int) -> TrialRecord:
    return TrialRecord(number, f"s-{number:04d}", {"a": 1}, {"a": 1}, {"gain": 1.0}, "finished", 1.5, 0)


def test_a_journal_survives_a_torn_line_but_not_a_broken_one(tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path, "s")
    with folder.lock():
        folder.begin(search_of(_tree()))
        folder.append("started", number=0, name="s-0000", overrides={"a": 1}, point={"a": 1}, memory={})
        folder.append_record(_record(0))
        journal = folder.path / "journal.jsonl"
        whole = journal.read_bytes()
        journal.write_bytes(whole + b'{"event": "ended", "numb')
        assert folder.read().records == [_record(0)]
        folder.drop_torn_line()
        assert journal.read_bytes() == whole
        journal.write_bytes(b"garbage\n" + whole)
        for read in (folder.read, folder.drop_torn_line):
            with pytest.raises(SearchError, match=r"journal.jsonl, line 1 is damaged"):
                read()
        journal.write_bytes(whole + b'{"event": "eaten"}\n')
        with pytest.raises(SearchError, match=r"journal.jsonl, line 3 cannot be read: unknown event 'eaten'"):
            folder.read()


def test_only_plain_names_are_taken(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"search name '\.\./s' must have 1 to 100 letters"):
        SearchFolder(tmp_path, "../s")


def test_budget_may_change_but_not_the_search(tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path, "s")
    with folder.lock():
        folder.begin(search_of(_tree()))
        folder.begin(search_of(_tree(budget={"trials": 9}, resources={"workers": 2})))
        with pytest.raises(SearchError, match=r"objectives: expected .*'max'.*, found .*'min'"):
            folder.begin(search_of(_tree(objectives={"gain": "min"})))
    assert isinstance(folder.read(), Past)
    assert folder.read_search() == search_of(_tree(budget={"trials": 9}, resources={"workers": 2}))


def test_the_stored_key_of_metrics_stays(tmp_path: Path) -> None:
    """Journals of the first release have `figures` where the code says metrics."""
    folder = SearchFolder(tmp_path, "s")
    folder.path.mkdir()
    ended = {"number": 0, "name": "s-0000", "overrides": {}, "point": {}, "figures": {"gain": 2.0}, "seed": 0}
    folder.append("started", number=0, name="s-0000", overrides={}, point={}, memory={})
    folder.append("ended", **ended, status="finished", seconds=1.0, reason="", epoch=None, changes=[])
    folder.append("known", point={"x": 1}, figures={"gain": 3.0}, origin="an earlier search")
    past = folder.read()
    assert past.records[0].metrics == {"gain": 2.0}
    assert past.warm_start == [WarmStartPoint({"x": 1}, {"gain": 3.0}, "an earlier search")]
    folder.append_record(past.records[0])
    folder.append_warm_start(past.warm_start[0])
    lines = [json.loads(line) for line in (folder.path / "journal.jsonl").read_text().splitlines()]
    assert lines[3:] == lines[1:3]


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "started", "number": 1, "name": "s-0001", "overrides": {}, "point": {}}',
        '{"event": "started", "number": 1, "name": "s-0001", "overrides": {}, "point": 3, "memory": {}}',
        '{"event": "changed", "number": 1, "overrides": {}, "point": {}, "before": {}}',
        '{"event": "known", "point": 3, "figures": null, "origin": "o"}',
        '{"event": ["ended"]}',
        json.dumps({"event": "ended", **asdict(_record(1))}),
        "{}",
    ],
)
def test_a_line_that_says_what_cannot_be_is_named(line: str, tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path, "s")
    with folder.lock():
        (folder.path / "journal.jsonl").write_text(line + "\n")
        with pytest.raises(SearchError, match=r"journal.jsonl, line 1 cannot be read"):
            folder.read()


def test_points_of_another_space_are_refused(tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path, "s")
    with folder.lock():
        folder.begin(search_of(_tree()))
        folder.append("known", point={"a": 1}, figures={"loss": 1.0}, origin="earlier")
    with pytest.raises(SearchError, match="earlier has no metric gain"):
        read_search_result(tmp_path, "s")
