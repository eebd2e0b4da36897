"""No command writes over an input, or over a file of the user."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.errors import UserError
from spikefleet.outputs import check_outputs
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.sources import prepare
from support.finished import NAME

OWN = b"a file of the user"


def invoke(folder: Path, *words: str) -> tuple[int, str]:
    with contextlib.chdir(folder):
        done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def desk(copied: Callable[[], Path], tmp_path: Path) -> Path:
    copied()
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / "a.png")
    return tmp_path


def test_an_input_is_never_written_over(desk: Path) -> None:
    picture = (desk / "a.png").read_bytes()
    (desk / "link.png").symlink_to("a.png")
    (desk / "hard.png").hardlink_to(desk / "a.png")
    for out in ("a.png", "./a.png", "link.png", "hard.png"):
        for force in ((), ("--force",)):
            code, said = invoke(desk, "predict", NAME, "a.png", "--out", out, *force)
            assert code == 2, (out, said)
            assert "would overwrite what the command reads" in said
            assert (desk / "a.png").read_bytes() == picture
    (desk / "loop.png").symlink_to("loop.png")
    code, said = invoke(desk, "predict", NAME, "a.png", "loop.png", "--out", "p.png")
    assert code == 1, said
    assert "1 of 2 images cannot be read" in said, "a bad input does not keep the others from being drawn"
    assert (desk / "p.png").is_file()
    checkpoint = next((desk / "runs" / NAME / "checkpoints").glob("step-*"))
    code, said = invoke(desk, "energy", str(checkpoint), "--out", str(checkpoint), "--force", "--images", "1")
    assert (code, "would overwrite what the command reads" in said) == (2, True)


COMMANDS = {
    "predict": (("predict", NAME, "a.png", "--out", "out.png"), "out.png"),
    "evaluate": (("evaluate", NAME, "--split", "val", "--out", "out"), "out/confusion.png"),
    "energy": (("energy", NAME, "--images", "1", "--out", "out"), "out/energy.png"),
    "energy of a recipe": (("energy", "digits", "--rate", "0.1", "--size", "8", "--out", "out"), "out/energy.json"),
    "gradients": (("gradients", "digits", "--noise", "8", "--images", "2", "--out", "g.png"), "g.png"),
    "spike-check": (("spike-check", NAME, "--measured", "0", "--out", "spike_check.json"), "spike_check.json"),
}

PLACES = {
    "/proc/x": "cannot be written: No such file or directory in /proc; give another place",
    "/dev/null/x": "/dev/null is a file, and not a directory; give another place",
    "loop/x": "its symbolic links form a loop; check the path",
    f"{'n' * 300}/x": "a name in it is too long; check the path",
}


@pytest.mark.parametrize("place", PLACES, ids=["proc", "file", "loop", "long"])
def test_places_that_cannot_be_written_are_refused_before_any_work(place: str, desk: Path, stores_dir: Path) -> None:
    (desk / "loop").symlink_to("loop")
    run = ("train", "digits", "--workers", "0", "train.epochs=1")
    commands = [
        *((*words[:-1], f"{place}{Path(words[-1]).suffix}") for words, _ in COMMANDS.values()),
        ("registry", "pull", "sg_resnet_digits@champion", "--out", place),
        ("data", "prepare", "digits", "--out", place),
        ("data", "prepare", "digits", "--stores-dir", place),
        (*run, "--stores-dir", place),
        (*run, "--stores-dir", str(stores_dir), "--runs-dir", place),
        ("tune", "digits_t_gate_schedule", "--stores-dir", str(stores_dir), "--runs-dir", place),
    ]
    for words in commands:
        code, said = invoke(desk, *words)
        assert (code, PLACES[place] in said) == (2, True), (words, said)


@pytest.mark.parametrize("place", ["loop", "n" * 300], ids=["loop", "long"])
def test_other_commands_say_what_is_wrong_with_a_path(place: str, desk: Path) -> None:
    (desk / "loop").symlink_to("loop")
    for words in (
        ("registry", "list", "--runs-dir", place),
        ("doctor", "--runs-dir", place),
        ("tracking", "repair", "--runs-dir", place),
        ("data", "show", place),
    ):
        code, said = invoke(desk, *words)
        assert code == 2, (words, said)
        assert "error: " in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_exists_needs_force(command: str, desk: Path, stores_dir: Path) -> None:
    words, name = COMMANDS[command]
    if "--split" in words or command in ("energy", "spike-check"):
        words = (*words, "--stores-dir", str(stores_dir))
    (desk / name).parent.mkdir(exist_ok=True)
    (desk / name).write_bytes(OWN)
    code, said = invoke(desk, *words)
    assert (code, (desk / name).read_bytes()) == (2, OWN), said
    assert "--force to replace it" in said
    code, said = invoke(desk, *words, "--force")
    assert code == 0, said
    assert (desk / name).read_bytes() != OWN


def test_the_proof_of_a_run_goes_into_its_report(desk: Path, stores_dir: Path) -> None:
    (desk / "spike_check.json").write_bytes(OWN)
    proof = desk / "runs" / NAME / "report" / "spike_check.json"
    proof.write_bytes(OWN)
    code, said = invoke(desk, "spike-check", NAME, "--measured", "0", "--stores-dir", str(stores_dir))
    assert code == 0, said
    assert (desk / "spike_check.json").read_bytes() == OWN
    assert b"proved" in proof.read_bytes()


def test_what_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "report").mkdir()
    for name in ("run/run.json", "run/checkpoints/state.json", "run/report/energy.json", "mine.json"):
        (tmp_path / name).write_text("{}")
    check_outputs([tmp_path / "new.json", tmp_path / "deep" / "new.json", tmp_path / "run" / "report" / "energy.json"])
    check_outputs([tmp_path / "mine.json"], force=True)
    for name, said in (
        ("mine.json", "exists"),
        ("run/checkpoints/state.json", "exists"),
        ("run", "is a directory"),
        ("mine.json/x.json", "is a file, and not a directory"),
    ):
        with pytest.raises(UserError, match=said):
            check_outputs([tmp_path / name])


def test_a_store_is_not_prepared_over_what_is_not_its_own(stores_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(stores_dir / "digits", store)
    (store / "raw.txt").write_bytes(OWN)
    with pytest.raises(StoreError, match=r"raw\.txt.*would be removed"):
        prepare("digits", None, store, seed=1, overwrite=True)
    assert (store / "raw.txt").read_bytes() == OWN
    (store / "raw.txt").unlink()
    assert prepare("digits", None, store, seed=1, overwrite=True).manifest.options["seed"] == 1
