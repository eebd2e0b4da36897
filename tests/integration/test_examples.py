"""The examples run as they are printed; the second finds the run that the first has trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "platform" / "examples"


PROMISES = {
    "train_and_deploy.py": ("it is champion", "nJ an image", "said ", "best at T <= 2: models:/example/1, proved"),
    "walk_through.py": ("is complete", "rate 0.", "proved", "under int32-45nm", "models:/example/1 ('champion',)"),
}


def test_examples_say_what_they_promise(tmp_path: Path) -> None:
    for name, parts in PROMISES.items():
        command = [sys.executable, str(EXAMPLES / name), str(tmp_path)]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for part in parts:
            assert part in done.stdout, done.stdout
