"""What a submitted job runs: `python -m spikefleet.cli.job_entry SUBMISSION VERSION COMMIT WORDS...`.

The first line of its log says when the cluster has another version than the machine that submitted it. The process
keeps these words as its command line, by which `spikefleet stop` finds it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from spikefleet.cli import main
from spikefleet.versions import code_version, library_versions

_COMMIT = re.compile(r"[0-9a-f]{12}")
_SENT = "working_dir_files"
"""Directory of Ray in which a job with code of its own starts: a copy that Ray removes."""
_PLACE_OF_RUNS = ("SPIKEFLEET_RUNS", "--runs-dir")
_PLACES_OF_STORES = ("SPIKEFLEET_STORES", "--stores-dir", "--out")


def start(words: list[str]) -> None:
    """Compares the versions, then runs the command."""
    submission, version, commit, *command = words
    here = library_versions()["spikefleet"]
    if here != version:
        print(
            f"error: job {submission} was submitted by spikefleet {version}, but the cluster has {here}; submit it "
            f"from a machine with {here}, or start the cluster with {version}",
            flush=True,
        )
        sys.exit(2)
    own = code_version()
    if own != commit and _COMMIT.fullmatch(own) and _COMMIT.fullmatch(commit):
        print(f"note: submitted from commit {commit}; the cluster has commit {own} of the same version", flush=True)
    refuse_place_in_copy(command, Path.cwd())
    sys.argv = ["spikefleet", *command]
    main()


def refuse_place_in_copy(command: list[str], folder: Path) -> None:
    """Ends the job if what it writes would lie in the copy of its code, and be lost with it.

    Args:
        command: words after `spikefleet`.
        folder: in which the job starts.
    """
    what, names = ("stores", _PLACES_OF_STORES) if {"data", "prepare"} <= set(command) else ("runs", _PLACE_OF_RUNS)
    given = any(os.environ.get(name) or any(word.partition("=")[0] == name for word in command) for name in names)
    if _SENT in folder.parts and not given:
        variable, option, *_ = names
        print(
            f"error: a job with --with-code would keep its {what} in the copy of that code, which Ray removes; set "
            f"{variable} on the hosts before `ray start`, or {option} to a directory that all of them see",
            flush=True,
        )
        sys.exit(2)


if __name__ == "__main__":
    start(sys.argv[1:])
