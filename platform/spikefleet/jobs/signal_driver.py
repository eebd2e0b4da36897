"""Run as a job on the head: sends a signal to the command of another job, which runs there too.

The Jobs API itself gives a command three seconds to end, too few for the step and the checkpoint of a training.
Exit code 0 if the signal was sent, 1 if no such process runs.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from spikefleet.jobs.submission import ENTRY


def processes_of(submission: str, processes: Path = Path("/proc")) -> list[int]:
    """Ids of the processes that run the command of a job."""
    return sorted(
        int(folder.name)
        for folder in processes.iterdir()
        if folder.name.isdigit()
        and int(folder.name) != os.getpid()
        and _words(folder)[1:4] == ["-m", ENTRY, submission]
    )


def _words(folder: Path) -> list[str]:
    with suppress(OSError):  # it has ended, or is another user's
        return (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def main() -> None:
    """Sends SIGTERM to the command of the job that the first argument names."""
    sent = False
    for process in processes_of(sys.argv[1]):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGTERM)
            sent = True
    sys.exit(0 if sent else 1)


if __name__ == "__main__":
    main()
