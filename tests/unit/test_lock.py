"""A lock holds against other processes, and against another attempt of its own process, which must not open it up."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikefleet.errors import UserError
from spikefleet.runs.run_dir import Run
from spikefleet.tracking import journal
from spikefleet.tracking.journal import Journal
from spikefleet_tune.errors import SearchError
from spikefleet_tune.journal import SearchFolder
from spikefleet_tune.lock import LockedError, hold

_ATTEMPT = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(3)
"""

_HOLD = """
import sys, time
from pathlib import Path
from spikefleet_tune.lock import hold
lock = hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def is_free(path: Path) -> bool:
    """Whether another process gets the lock, by fcntl alone and none of our code."""
    code = subprocess.run([sys.executable, "-c", _ATTEMPT, str(path)], check=False).returncode
    assert code in (0, 3)
    return code == 0


def _run(folder: Path) -> tuple[Path, Callable[[], Callable[[], None]]]:
    return folder / "r" / ".lock", lambda: Run(folder / "r").lock().release


def _search(folder: Path) -> tuple[Path, Callable[[], Callable[[], None]]]:
    return folder / "s" / ".lock", lambda: SearchFolder(folder, "s").lock().release


def _journal(folder: Path) -> tuple[Path, Callable[[], Callable[[], None]]]:
    return folder / "tracking.lock", lambda: Journal(folder).close


@pytest.mark.parametrize("holder", [_run, _search, _journal])
def test_a_second_attempt_of_the_same_process_is_refused_and_lets_nobody_in(
    holder: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_ENDING_S", 0.0)
    path, take = holder(tmp_path)
    release = take()
    assert not is_free(path)
    for _ in range(2):
        with pytest.raises((UserError, SearchError), match=rf"already [a-z ]+ \(process {os.getpid()}, this one\)"):
            take()
        assert not is_free(path), "the refused attempt has dropped the lock of the first"
    release()
    assert is_free(path)
    take()()


@pytest.mark.parametrize("holder", [_run, _search, _journal])
def test_the_holder_in_another_process_is_named(holder: Callable[[Path], Any], tmp_path: Path) -> None:
    path, take = holder(tmp_path)
    path.parent.mkdir(exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises((UserError, SearchError), match=rf"already [a-z ]+ \(process {other.pid} on "):
            take()
        other.kill()
        other.wait()
        assert str(other.pid) in path.read_text(), "the file of a killed process is still there, and stands in no way"
        take()()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run directory .*file/r cannot be written"):
        Run(tmp_path / "file" / "r").lock()
    with pytest.raises(SearchError, match=r"search directory .*file/s cannot be written"):
        SearchFolder(tmp_path / "file", "s").lock()
    with pytest.raises(NotADirectoryError):
        hold(tmp_path / "file" / "lock")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        hold(tmp_path / "folder")
    if os.getuid():
        (tmp_path / "folder").chmod(0o500)
        with pytest.raises(PermissionError):
            hold(tmp_path / "folder" / "lock")


def test_another_name_of_the_same_file_is_the_same_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path):
        (tmp_path / "link").symlink_to(path)
        os.link(path, tmp_path / "twin")
        for name in ("link", "twin"):
            with pytest.raises(LockedError):
                hold(tmp_path / name)
        assert not is_free(path)
    with hold(tmp_path / "twin"):
        assert not is_free(path)


def test_of_many_threads_one_holds_the_lock_at_a_time(tmp_path: Path) -> None:
    inside, most, done = 0, 0, []  # type: ignore[var-annotated]

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with hold(tmp_path / "lock", patience_s=30):
                inside += 1
                most = max(most, inside)
                done.append(is_free(tmp_path / "lock") if len(done) % 8 == 0 else False)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert len(done) == 20
    assert not any(done), "another thread that waited has dropped the lock"
    assert is_free(tmp_path / "lock")


def test_a_thread_that_gives_up_waiting_drops_nothing(tmp_path: Path) -> None:
    """It waited for another process; meanwhile a thread of its own process got the lock."""
    path = tmp_path / "lock"
    refused: list[LockedError] = []

    def wait() -> None:
        with pytest.raises(LockedError) as caught:
            hold(path, patience_s=2.0)
        refused.append(caught.value)

    with subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)  # it is waiting
        other.kill()
        other.wait()
        with hold(path):
            thread.join()
            assert refused[0].own
            assert not is_free(path)


def test_patience_waits_until_the_holder_is_gone_and_no_longer_than_it_is(tmp_path: Path) -> None:
    lock = hold(tmp_path / "lock")
    began = time.monotonic()
    with pytest.raises(LockedError):
        hold(tmp_path / "lock", patience_s=0.4)
    assert 0.4 <= time.monotonic() - began < 5
    threading.Timer(0.3, lock.release).start()
    hold(tmp_path / "lock", patience_s=30).release()
    lock.release()  # a second time: nothing
    with hold(tmp_path / "lock"):
        lock.release()  # the lock of another by now
        assert not is_free(tmp_path / "lock")


def test_a_forked_child_neither_holds_the_lock_nor_gives_it_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path) as lock:
        child = os.fork()
        if not child:
            try:
                with pytest.raises(LockedError) as caught:
                    hold(path)
                assert not caught.value.own
                assert f"process {os.getppid()} on " in caught.value.holder
                lock.release()
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert not is_free(path)
    assert is_free(path)


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    """A data loader of a killed run must not keep the next one out; the lock that it takes itself is its own."""
    program = (
        "import os, sys, time; from pathlib import Path; from spikefleet_tune.lock import hold\n"
        "lock = hold(Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child:\n    print(child, flush=True); os._exit(0)\n"
        "os.close(1); time.sleep(60)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True, check=True
    )
    child = int(out.stdout)
    try:
        os.kill(child, 0)  # alive
        assert is_free(tmp_path / "lock")
    finally:
        os.kill(child, 9)
