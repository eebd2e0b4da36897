"""The examples run as they are printed; the second finds the run that the first has trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "platform" / "examples"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("desk")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "train_and_deploy.py",
            ("it is champion", "nJ an image", "said ", "best at T <= 2: models:/example/1, proved"),
        ),
        (
            "walk_through.py",
            ("is complete", "rate 0.", "proved", "under int32-45nm", "models:/example/1 ('champion',)"),
        ),
    ],
)
def test_examples_say_what_they_promise(name: str, parts: tuple[str, ...], desk: Path) -> None:
    command = [sys.executable, str(EXAMPLES / name), str(desk)]
    done = subprocess.run(command, cwd=desk, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in parts:
        assert part in done.stdout, done.stdout
