"""What a command imports: those that only list, explain or complete do without what takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "torchvision", "ray", "mlflow", "pyarrow", "numpy", "matplotlib", "spikingjelly", "optuna", "sklearn")

PROGRAM = """
import sys
sys.argv[0] = "spikefleet"
from spikefleet.cli import main
try:
    main()
finally:
    sys.stdout.flush()
    print("imported:", *(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)
"""

GROUPS = ("config", "data", "registry", "tracking")
COMMANDS = (
    *("train", "evaluate", "predict", "recipes", "tune", "searches", "reproduce", "tables", "spike-check", "energy"),
    *(
        "gradients",
        "doctor",
        "ui",
        "config show",
        "data prepare",
        "data show",
        "data sources",
        "registry list",
        "registry show",
    ),
    *("registry best", "registry pull", "registry renew", "tracking sync"),
)


def start(words: list[str], folder: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A command in its own process, and which of the heavy modules it has imported at its end."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *words],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("imported:")]
    return done, line.split()[1:]


def help_of_all(folder: Path) -> list[str]:
    """Help of every command, in one process: what any of them imports is there at the end."""
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom spikefleet.cli import app\n"
        f"for words in {[(*command.split(), '--help') for command in (*COMMANDS, *GROUPS, '')]!r}:\n"
        "    done = CliRunner().invoke(app, list(words))\n"
        "    assert done.exit_code == 0 and 'Usage' in done.output, (words, done.output)\n"
        f"print('imported:', *(name for name in {HEAVY!r} if name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("imported:")[1].split()


def test_help_of_every_command_is_light(tmp_path: Path) -> None:
    assert help_of_all(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--version"], "mlflow 3"),
        (["recipes"], "digits"),
        (["recipes", "--json"], '"recipe": "digits"'),
        (["searches"], "digits_t_gate_schedule"),
        (["tables"], "sg_resnet_table3"),
        (["data", "sources"], "upsample=1"),
        (["config", "show", "scenes_spike_yolo", "model.timesteps=2"], "timesteps: 2"),
    ],
)
def test_listings_are_light(words: list[str], shown: str, tmp_path: Path) -> None:
    done, imported = start(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert imported == []


def test_a_refusal_of_an_override_is_light(tmp_path: Path) -> None:
    done, imported = start(["train", "digits", "model.timestep=2"], tmp_path)
    assert done.returncode == 2
    assert "model.timesteps" in done.stderr
    assert imported == []


@pytest.mark.parametrize(
    "line",
    ["spikefleet tra", "spikefleet train dig", "spikefleet train digits model.time", "spikefleet data prepare d"],
)
def test_completion_is_light(line: str, tmp_path: Path) -> None:
    words = line.split()
    variables = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    done, imported = start([], tmp_path, _SPIKEFLEET_COMPLETE="complete_bash", **variables)
    assert done.stdout.startswith(("train", "digits", "model.timesteps="))
    assert imported == []


def test_the_check_sees_what_a_command_imports(tmp_path: Path) -> None:
    done, imported = start(["evaluate", "gone"], tmp_path)
    assert done.returncode == 2
    assert {"torch", "numpy", "pyarrow"} <= set(imported)
