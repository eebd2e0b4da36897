"""Work in processes that are forked from one that has imported torch: a start takes a fraction of a second."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.ranks import SERVER


class Forked:
    """A process of its own, whose output goes into a file.

    Args:
        output: the file, of both streams.
        work: a function of a module, which the process calls.
        arguments: of the function.
    """

    def __init__(self, output: Path, work: Callable[..., object], *arguments: Any) -> None:
        self._output = output
        self._process = SERVER.Process(target=_call, args=(str(output), work, arguments))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, negative after a signal; None while it runs."""
        return self._process.exitcode

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self._output.read_text() if self._output.exists() else ""

    def send(self, signum: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, signum)

    def wait(self, seconds: float) -> str:
        """Waits for its end; returns what it printed. A process that takes longer is killed, which fails."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"it took longer than {seconds:g} s: {self.said}")
        return self.said


def command(output: Path, *words: str, folder: Path | None = None) -> Forked:
    """A command of the program in a process of its own, by default in the directory of this one."""
    return Forked(output, _main, words, folder)


def script(output: Path, *words: str, folder: Path) -> Forked:
    """A Python file with its arguments in a process of its own that works in a folder."""
    return Forked(output, _run_file, words, folder)


def _call(output: str, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 -- to the end of the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    work(*arguments)


def _main(words: tuple[str, ...], folder: Path | None) -> None:
    from spikefleet.cli import main

    os.environ.update(COLUMNS="200", NO_COLOR="1")
    if folder is not None:
        os.chdir(folder)
    sys.argv = ["spikefleet", *words]
    main()


def _run_file(words: tuple[str, ...], folder: Path) -> None:
    os.environ["COLUMNS"] = "200"
    os.chdir(folder)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
