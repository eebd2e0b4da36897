"""The journal loses nothing, doubles nothing and keeps the order, wherever its process is killed."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikefleet.errors import UserError
from spikefleet.tracking.delivery import MAX_METRICS, MAX_PARAMS_OR_TAGS, next_batch
from spikefleet.tracking.journal import DELIVERED, JOURNAL, Journal
from spikefleet.tracking.mlflow_client import public_uri
from spikefleet_tune.jsonl_log import Entry


def number(journal: Journal, count: int, first: int = 0) -> None:
    for value in range(first, first + count):
        journal.append({"kind": "metrics", "step": value, "values": {"loss": value / 7}})


def steps(journal: Journal) -> list[int]:
    return [record["step"] for record in journal.records()]


def deliver(journal: Journal, count: int) -> list[int]:
    batch = journal.unsent(100_000)[:count]
    done = journal.delivered
    journal.mark_delivered(replace(done, offset=batch[-1].end, records=done.records + len(batch)))
    return [entry.record["step"] for entry in batch]


def test_records_come_back_in_order_with_the_same_floats(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    values = [0.1 + 0.2, 5e-324, float("inf"), -0.0, 1e300]
    journal.append({"kind": "metrics", "step": 0, "values": dict(zip("abcde", values, strict=True)), "note": "β\n"})
    journal.close()

    (record,) = Journal(tmp_path).records()
    assert list(record["values"].values()) == values
    assert record["note"] == "β\n"


@pytest.mark.parametrize("torn", [b'{"kind"', b'{"kind":"metrics"}', b"\0\0\0\0", b"\xff\xfe\n", b"[1]\n"])
def test_a_last_line_that_was_torn_by_a_kill_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    journal = Journal(tmp_path)
    number(journal, 3)
    journal.close()
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(torn)

    journal = Journal(tmp_path)
    number(journal, 1, first=3)
    assert steps(journal) == [0, 1, 2, 3]
    assert journal.pending == 4
    assert torn.strip() not in (tmp_path / JOURNAL).read_bytes()[-40:]


def test_a_damaged_line_in_the_middle_is_refused_with_its_place(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    number(journal, 3)
    journal.close()
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(lines[0] + b"%" + lines[1] + lines[2])

    with pytest.raises(UserError, match=r"tracking\.jsonl, line 2"):
        Journal(tmp_path)
    (tmp_path / JOURNAL).unlink()
    Journal(tmp_path).close()  # the refusal has released the lock


def test_a_crash_between_sending_and_acknowledging_sends_the_same_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    number(journal, 5)
    assert deliver(journal, 2) == [0, 1]
    sent = journal.unsent(100_000)
    journal.close()

    journal = Journal(tmp_path)
    assert journal.unsent(100_000) == sent
    assert journal.pending == 3
    assert deliver(journal, 3) == [2, 3, 4]
    assert journal.pending == 0
    assert journal.unsent(100_000) == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "[" * 100_000, '{"offset": 7}', '{"tracking_uri": 3}', '{"tracking_uri": "x", "records": "a"}']
    + [f'{{"tracking_uri": "x", "offset": {offset}, "records": 1}}' for offset in ("5", "-7", '"5"')],
)
def test_an_unreadable_delivered_position_means_from_the_beginning(tmp_path: Path, content: str) -> None:
    journal = Journal(tmp_path)
    number(journal, 2)
    journal.close()
    (tmp_path / DELIVERED).write_text(content)

    assert Journal(tmp_path).pending == 2


def test_a_record_longer_than_the_reading_size_is_read_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"kind": "tags", "values": {"long": "x" * 5000}})
    number(journal, 1)
    assert journal.unsent(100)[0].record["kind"] == "tags"


def test_a_second_process_is_refused_until_the_first_one_is_gone(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; "
        "from spikefleet.tracking.journal import Journal; Journal(Path(sys.argv[1]))"
    )
    journal = Journal(tmp_path)

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
        )

    refused = other()
    assert refused.returncode == 1
    assert "the run is already being tracked (process " in refused.stderr
    journal.close()
    assert other().returncode == 0


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    number(journal, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / JOURNAL).stat().st_size + 10, hard))
    try:
        with pytest.raises(OSError, match="the disk is full"):
            number(journal, 1, first=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    number(journal, 1, first=4)
    journal.close()
    assert steps(Journal(tmp_path)) == [0, 1, 2, 4]


def test_a_closed_journal_takes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        number(journal, 1)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("log"), st.integers(1, 4)),
        st.tuples(st.just("deliver"), st.integers(1, 5)),
        st.tuples(st.just("crash after sending"), st.integers(1, 5)),
        st.tuples(st.just("kill while writing"), st.integers(1, 30)),
    ),
    max_size=25,
)


@given(actions=actions)
@settings(max_examples=60, deadline=None)
def test_every_record_arrives_exactly_once_wherever_the_process_dies(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int]]
) -> None:
    """The receiver is a set of rows, as MLflow's metric table is; the writer repeats what a torn line has lost."""
    directory = tmp_path_factory.mktemp("run")
    journal = Journal(directory)
    received: list[int] = []  # rows in the order of their first arrival
    logged = 0

    def send(count: int) -> list[Entry]:
        batch = journal.unsent(100_000)[:count]
        received.extend(e.record["step"] for e in batch if e.record["step"] not in received)
        return batch

    def acknowledge(batch: list[Entry]) -> None:
        done = journal.delivered
        if batch:
            journal.mark_delivered(replace(done, offset=batch[-1].end, records=done.records + len(batch)))

    def restart(damage: Callable[[], Any] = lambda: None) -> None:
        nonlocal journal, logged
        journal.close()
        damage()
        journal = Journal(directory)
        logged = len(steps(journal))

    for action, count in actions:
        match action:
            case "log":
                number(journal, count, first=logged)
                logged += count
            case "deliver":
                acknowledge(send(count))
            case "crash after sending":
                send(count)
                restart()
            case "kill while writing":
                line = (directory / JOURNAL).read_bytes()
                number(journal, 1, first=logged)
                written = min(len(line) + count, (directory / JOURNAL).stat().st_size - 1)
                restart(lambda size=written: os.truncate(directory / JOURNAL, size))  # type: ignore[misc]
    while batch := send(3):
        acknowledge(batch)
    journal.close()

    assert received == list(range(logged))
    assert steps(Journal(directory)) == received


kinds = st.one_of(
    st.tuples(st.just("metrics"), st.integers(1, MAX_METRICS)),
    st.tuples(st.sampled_from(["params", "tags"]), st.integers(1, MAX_PARAMS_OR_TAGS)),
    st.tuples(st.sampled_from(["create", "artifact", "status"]), st.just(0)),
)


@given(st.lists(kinds, max_size=30))
@settings(deadline=None)
def test_batches_hold_all_records_in_order_within_the_limits(shape: list[tuple[str, int]]) -> None:
    entries = [
        Entry({"kind": kind, "values": {f"{kind}{n}": n for n in range(count)}}, end)
        for end, (kind, count) in enumerate(shape)
    ]
    rest, sent = entries, list[Entry]()
    while rest:
        batch = next_batch(rest)
        counts = {kind: sum(len(e.record["values"]) for e in batch if e.record["kind"] == kind) for kind, _ in shape}
        assert counts.get("metrics", 0) <= MAX_METRICS
        assert max(counts.get("params", 0), counts.get("tags", 0)) <= MAX_PARAMS_OR_TAGS
        assert sum(counts.values()) <= MAX_METRICS
        assert len(batch) == 1 or all(e.record["kind"] in ("metrics", "params", "tags") for e in batch)
        sent += batch
        rest = rest[len(batch) :]
    assert sent == entries
    assert next_batch([]) == []


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://ann:s3cret@mlflow.example/x", "https://mlflow.example/x"),
        ("postgresql+psycopg://ann:p@ss@db/mlflow", "postgresql+psycopg://db/mlflow"),
        ("sqlite:////data/a@b/mlflow.db", "sqlite:////data/a@b/mlflow.db"),
    ],
)
def test_credentials_are_never_shown(uri: str, shown: str) -> None:
    assert public_uri(uri) == shown
