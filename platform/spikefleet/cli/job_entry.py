"""What a submitted job runs: `python -m spikefleet.cli.job_entry SUBMISSION VERSION COMMIT WORDS...`.

The first line of its log says when the cluster has another version than the machine that submitted it. The process
keeps these words as its command line, by which `spikefleet stop` finds it.
"""

from __future__ import annotations

import re
import sys

from spikefleet.cli import main
from spikefleet.versions import code_version, library_versions

_COMMIT = re.compile(r"[0-9a-f]{12}")


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
    sys.argv = ["spikefleet", *command]
    main()


if __name__ == "__main__":
    start(sys.argv[1:])
