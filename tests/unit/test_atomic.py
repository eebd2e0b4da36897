"""Files that are written whole, also by several at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikefleet_tune.atomic import replacing, write_atomically


def test_two_who_write_at_once_do_not_meet_in_one_file(tmp_path: Path) -> None:
    """Threads have one process number, and so may have processes in two containers."""
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def write_half() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
