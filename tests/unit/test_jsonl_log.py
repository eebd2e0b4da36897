"""A log of JSON lines against a list in memory: wherever a writer is killed or a disk is full, whole records stay."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikefleet_tune import jsonl_log
from spikefleet_tune.jsonl_log import DamagedLineError, JsonlLog

texts = st.text(max_size=20)
records = st.dictionaries(texts, st.one_of(texts, st.integers(), st.floats(allow_nan=False), st.none()), max_size=4)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("append"), records),
        st.tuples(st.just("short write"), st.tuples(records, st.integers(0, 200))),
        st.tuples(st.just("cut"), st.floats(0, 1)),
        st.tuples(st.just("tear"), st.binary(min_size=1, max_size=12).filter(lambda torn: b"\n" not in torn[:-1])),
    ),
    max_size=15,
)


@contextmanager
def room_for(path: Path, more: int) -> Iterator[None]:
    """Files of this process stop growing at the size of this one and some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.stat().st_size if path.exists() else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def read(log: JsonlLog, start: int = 0) -> list[dict[str, Any]]:
    return [entry.record for entry in log.entries(start)]


@pytest.mark.parametrize("options", [{"keep_open": True, "compact": True}, {}, {"durable": True}], ids=str)
@given(actions=actions)
@settings(max_examples=80, deadline=None)
def test_whole_records_are_left_and_no_others(
    options: dict[str, bool], actions: list[tuple[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    log = JsonlLog(path, **options)
    expected: list[dict[str, Any]] = []
    for action, value in actions:
        match action:
            case "append":
                log.append(value)
                expected.append(value)
            case "short write":
                record, more = value
                before = path.stat().st_size if path.exists() else 0
                with room_for(path, more):
                    try:
                        log.append(record)
                        expected.append(record)
                    except OSError:
                        assert path.stat().st_size == before, "no half line is left"
            case "cut" if path.exists():  # the writer is killed, and the machine has not kept the end
                os.truncate(path, int(path.stat().st_size * value))
                whole = path.read_bytes().count(b"\n")
                expected = expected[:whole]
            case "tear":  # the writer is killed in the middle of a line
                with path.open("ab") as file:
                    file.write(value)
                with suppress(ValueError):
                    expected += (
                        [record] if isinstance(record := json.loads(value), dict) and value[-1:] == b"\n" else []
                    )
        if action in ("cut", "tear"):
            assert read(log) == expected, "a reader stops before a torn line"
            log.close()
            log = JsonlLog(path, **options)
            assert log.drop_torn_line() == len(expected)
        assert read(log) == expected
    entries = list(log.entries())
    for position, entry in enumerate(entries):
        assert read(log, entry.end) == expected[position + 1 :]
    assert (entries[-1].end if entries else 0) == (path.stat().st_size if path.exists() else 0)
    log.close()


@given(rows=st.lists(records, min_size=2, max_size=5), data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_damaged_line_before_the_last_is_named(
    rows: list[dict[str, Any]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = JsonlLog(tmp_path_factory.mktemp("log") / "log.jsonl")
    for row in rows:
        log.append(row)
    lines = log.path.read_bytes().splitlines(keepends=True)
    damaged = data.draw(st.integers(0, len(rows) - 2))
    garbage = data.draw(
        st.sampled_from([b"\n", b"[1]\n", b"\xff\n", b"\0\0\n", b"%" + lines[damaged], b"[" * 9999 + b"\n"])
    )
    log.path.write_bytes(b"".join([*lines[:damaged], garbage, *lines[damaged + 1 :]]))
    starts = [0, *(len(b"".join(lines[: n + 1])) for n in range(damaged))]
    for start in starts:  # also by a reader that has read some of it before
        with pytest.raises(DamagedLineError, match=rf"log\.jsonl, line {damaged + 1} is damaged"):
            read(log, start)
    before = log.path.read_bytes()
    with pytest.raises(DamagedLineError):
        log.drop_torn_line()
    assert log.path.read_bytes() == before


def test_lines_are_those_that_are_on_disk_today(tmp_path: Path) -> None:
    record = {"b": [1, 0.1], "a": "β\n"}
    JsonlLog(tmp_path / "spaced").append(record)
    JsonlLog(tmp_path / "compact", compact=True).append({**record, "c": math.inf})
    assert (tmp_path / "spaced").read_bytes() == b'{"b": [1, 0.1], "a": "\\u03b2\\n"}\n'
    assert (tmp_path / "compact").read_bytes() == b'{"b":[1,0.1],"a":"\\u03b2\\n","c":Infinity}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        JsonlLog(tmp_path / "strict", allow_nan=False).append({"c": math.inf})
    assert not (tmp_path / "strict").exists()


def test_a_log_that_is_opened_anew_is_plain_data_and_one_that_is_closed_takes_nothing(tmp_path: Path) -> None:
    log: JsonlLog = pickle.loads(pickle.dumps(JsonlLog(tmp_path / "log")))
    assert read(log) == []
    assert log.drop_torn_line() == 0
    assert not log.path.exists()
    with pytest.raises(FileNotFoundError):
        JsonlLog(tmp_path / "none" / "log").append({})
    kept = JsonlLog(tmp_path / "log", keep_open=True)
    kept.append({"a": 1})
    kept.sync()
    kept.close()
    kept.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        kept.append({"a": 2})
    assert read(log) == [{"a": 1}]


def test_a_line_that_is_finished_while_it_is_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader comes to the end of the file in the middle of a write, and looks once more after it."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n"')
    decode = jsonl_log._record

    def slowly(line: bytes) -> dict[str, Any] | None:
        record = decode(line)
        if record is None:
            with path.open("ab") as writer:
                writer.write(b': 2}\n{"n": 3}\n')
        return record

    log = JsonlLog(path)
    with monkeypatch.context() as patch:
        patch.setattr(jsonl_log, "_record", slowly)
        (entry,) = log.entries()
    assert entry.record == {"n": 1}
    assert read(log, entry.end) == [{"n": 2}, {"n": 3}]
