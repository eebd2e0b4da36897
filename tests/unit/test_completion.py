"""What a shell is offered for a word that is begun, as bash asks for it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from spikefleet.cli import main
from spikefleet.cli.completion import joined
from spikefleet.registry.version import CONTENT_HASH

SPIKEFLEET = str(Path(sys.executable).with_name("spikefleet"))
VARIABLE = "_SPIKEFLEET_COMPLETE"


class Shell:
    """Asks as bash does, in this process: by variables, which hold the words and the number of the one to complete."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = monkeypatch, capsys

    def complete(self, *words: str, folder: Path, **variables: str) -> list[str]:
        line = ["spikefleet", *words]
        asked = {VARIABLE: "complete_bash", "COMP_WORDS": "\n".join(line), "COMP_CWORD": str(len(line) - 1)}
        with self._patch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["spikefleet"])
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            for name, value in {**asked, **variables}.items():
                patch.setenv(name, value)
            main()
        said = self._capture.readouterr()
        assert said.err == ""
        return said.out.split()


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with two runs and a registry of three versions, one of which is not spikefleet's."""
    for place in ("runs/first", "runs/second", "elsewhere/third", "runs/no-run"):
        (tmp_path / place).mkdir(parents=True)
        if place != "runs/no-run":
            (tmp_path / place / "run.json").write_text("{}")
    with closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as database:
        database.executescript(
            "CREATE TABLE model_versions (name TEXT, version INTEGER);"
            "CREATE TABLE model_version_tags (name TEXT, version INTEGER, key TEXT, value TEXT);"
            "CREATE TABLE registered_model_aliases (name TEXT, version INTEGER, alias TEXT);"
            "INSERT INTO model_versions VALUES ('net', 1), ('net', 2), ('other', 1);"
            "INSERT INTO model_version_tags "
            f"VALUES ('net', 1, '{CONTENT_HASH}', 'x'), ('net', 2, '{CONTENT_HASH}', 'y');"
            "INSERT INTO registered_model_aliases VALUES ('net', 2, 'champion');"
        )
        database.commit()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tra"], ["train", "tracking"]),
        (["train", "dig"], ["digits", "digits_narrow", "digits_spiking_resnet18_shortcut"]),
        (["tune", "digits_t"], ["digits_t_gate_schedule"]),
        (["reproduce", "shortcut_t"], ["shortcut_table1"]),
        (["data", "prepare", "im"], ["image_folder"]),
        (["train", "digits", "--resume", "fi"], ["first"]),
        (["train", "digits", "--runs-dir", "elsewhere", "--resume", ""], ["third"]),
        (["tracking", "sync", ""], ["first", "second"]),
        (["evaluate", "f"], ["first"]),
        (["evaluate", ""], ["models:/net@champion", "models:/net/2", "models:/net/1", "first", "second"]),
        (["registry", "show", ""], ["net"]),
        (["registry", "pull", "net/"], ["net/2", "net/1"]),
        (["train", "digits", "model.time"], ["model.timesteps=", "model.timesteps=4"]),
        (["train", "digits", "model.timesteps=3", "optim.nest"], ["optim.nesterov=", "optim.nesterov=false"]),
        (["train", "scenes_spike_yolo", "model.neuron.b"], ["model.neuron.bound=", "model.neuron.bound=4"]),
        (["tune", "digits_t_gate_schedule", "optim.l"], ["optim.lr=", "optim.lr_factors="]),
        (["tune", "digits_t_gate_schedule", "optim.mom"], ["optim.momentum=", "optim.momentum=0.9"]),
        (["train", "digits", "checkpoint.every"], ["checkpoint.every_epochs=", "checkpoint.every_steps="]),
        (["train", "gone", "model."], []),
        (["train", "nothing-begins-so"], []),
    ],
)
def test_names_of_what_there_is(words: list[str], found: list[str], folder: Path, shell: Shell) -> None:
    assert sorted(shell.complete(*words, folder=folder)) == sorted(found)


def test_a_registry_that_is_a_server_is_not_asked(folder: Path, shell: Shell) -> None:
    assert shell.complete("registry", "show", "", folder=folder, MLFLOW_TRACKING_URI="http://127.0.0.1:9") == []
    here = f"sqlite:///{folder}/runs/mlflow.db"
    assert shell.complete("registry", "show", "", folder=folder / "elsewhere", MLFLOW_TRACKING_URI=here) == ["net"]


@pytest.mark.parametrize("content", [b"", b"no database", None])
def test_a_registry_that_cannot_be_read_offers_nothing(content: bytes | None, folder: Path, shell: Shell) -> None:
    database = folder / "runs" / "mlflow.db"
    database.unlink()
    if content is not None:
        database.write_bytes(content)
    assert shell.complete("registry", "show", "", folder=folder) == []
    assert database.exists() == (content is not None)


def test_a_registry_that_is_being_written_is_not_waited_for(folder: Path, shell: Shell) -> None:
    with closing(sqlite3.connect(folder / "runs" / "mlflow.db")) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert shell.complete("registry", "show", "", folder=folder) == []
    assert shell.complete("registry", "show", "", folder=folder) == ["net"]


@pytest.mark.parametrize(
    ("words", "position", "whole", "place", "before"),
    [
        (["s", "evaluate", "mod"], 2, ["s", "evaluate", "mod"], 2, ""),
        (["s", "evaluate", "models", ":", "/net"], 4, ["s", "evaluate", "models:/net"], 2, "models:"),
        (["s", "evaluate", "models", ":"], 3, ["s", "evaluate", "models:"], 2, "models:"),
        (
            ["s", "evaluate", "models", ":", "/net", "@", "ch"],
            6,
            ["s", "evaluate", "models:/net@ch"],
            2,
            "models:/net@",
        ),
        (["s", "evaluate", "models:/net"], 2, ["s", "evaluate", "models:/net"], 2, ""),
        (["s", "train", "d", "a.b", "=", "2", "c"], 6, ["s", "train", "d", "a.b=2", "c"], 4, ""),
        (["s", "train", "d", "a.b", "=", ""], 5, ["s", "train", "d", "a.b="], 3, "a.b="),
        (["s", "train"], 2, ["s", "train", ""], 2, ""),
        (["s", "train", "d", "a.b", "=", "2", ""], 6, ["s", "train", "d", "a.b=2", ""], 4, ""),
    ],
)
def test_words_that_bash_took_apart(words: list[str], position: int, whole: list[str], place: int, before: str) -> None:
    assert joined(words, position) == (whole, place, before)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["evaluate", "models", ":", "/net", "@", ""], ["champion"]),
        (["evaluate", "models", ":", "/n"], ["/net@champion", "/net/1", "/net/2"]),
        (["train", "digits", "model.timesteps", "=", ""], ["", "4"]),
    ],
)
def test_bash_gets_the_part_that_it_asks_for(words: list[str], offered: list[str], folder: Path) -> None:
    """The script that `--show-completion` prints, called as bash calls it."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    script = subprocess.run(
        [SPIKEFLEET], env={**environment, VARIABLE: "source_bash"}, capture_output=True, text=True, check=True
    ).stdout
    function = next(line.strip().removesuffix("() {") for line in script.splitlines() if line.strip().endswith("() {"))
    line = " ".join(f"'{word}'" for word in ["spikefleet", *words])
    program = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; {function} '{SPIKEFLEET}'\n"
    program += 'printf "<%s>\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    found = sorted(line.strip("<>") for line in done.stdout.split())
    assert found == sorted(word for word in offered if word)
