"""The batch script of platform/README.md, with stand-ins for the programs that it calls."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "platform" / "README.md"
STAND_INS = {
    "hostname": "echo 10.0.0.1 10.0.0.2",
    "srun": 'echo "$@" >> calls',
    "ray": 'echo ray "$@" >> calls; [ "$(grep -c ^ray calls)" -gt 1 ]',  # the head is not there at once
    "spikefleet": "trap 'exit 7' TERM; echo spikefleet \"$@\" >> calls; while true; do sleep 0.02; done",
}


def script() -> str:
    (found,) = [
        block for block in re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL) if "#SBATCH" in block
    ]
    return str(found)


def ended(folder: Path, text: str) -> int:
    """Runs a script until the training has begun, signals it as Slurm does, and returns its exit code."""
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    settings = {"SLURMD_NODENAME": "node1", "SLURM_CPUS_PER_TASK": "16", "PATH": f"{folder}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", "-uc", text], cwd=folder, env=settings, start_new_session=True)
    calls, began = folder / "calls", time.monotonic()
    try:
        while not (calls.is_file() and "spikefleet" in calls.read_text()):
            assert time.monotonic() - began < 60
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=60)
    finally:
        with suppress(ProcessLookupError):  # what it has left behind
            os.killpg(process.pid, signal.SIGKILL)


def test_the_batch_script_starts_all_hosts_and_ends_with_the_exit_code_of_the_training(tmp_path: Path) -> None:
    assert ended(tmp_path, script()) == 7, "the training has its time for a checkpoint"
    calls = (tmp_path / "calls").read_text()
    assert "--nodelist=node1 ray start --head --node-ip-address=10.0.0.1 --port=6379 --block" in calls
    assert "--nodes=3 --ntasks=3 --exclude=node1 ray start --address=10.0.0.1:6379 --block" in calls
    assert calls.count("ray health-check --address 10.0.0.1:6379") == 2
    assert "--address 10.0.0.1:6379" in next(line for line in calls.splitlines() if line.startswith("spikefleet"))


@pytest.mark.parametrize(
    ("right", "wrong"), [("wait $RUN; wait $RUN", "wait $RUN"), ("trap 'kill -TERM $RUN' TERM", "")]
)
def test_a_script_that_does_not_wait_for_the_checkpoint_is_noticed(tmp_path: Path, right: str, wrong: str) -> None:
    text = script()
    assert right in text
    assert ended(tmp_path, text.replace(right, wrong)) != 7
