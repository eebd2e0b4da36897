"""A real MLflow server for tests of what happens behind one, and while it is away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from urllib.error import URLError
from urllib.request import urlopen

START_S = 60


class Server:
    """A real MLflow server that can be killed and started again on the same port and database.

    As a context manager it is created stopped, and killed on the way out.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(signal.SIGKILL)

    def start(self) -> None:
        """Starts the server and returns when it answers.

        Raises:
            TimeoutError: it does not answer within `START_S` seconds; the message is the server's log.
        """
        options = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        options += ["--backend-store-uri", f"sqlite:///{self._directory}/server.db"]
        options += ["--artifacts-destination", f"{self._directory}/artifacts"]
        with (self._directory / "server.log").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                cwd=self._directory,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except (URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise TimeoutError((self._directory / "server.log").read_text())

    def send(self, which: signal.Signals) -> None:
        """Sends a signal to the server and to every process that it started."""
        assert self._process is not None
        os.killpg(self._process.pid, which)

    def stop(self, how: signal.Signals) -> None:
        """Ends the server by the signal `how`; one that is not running stays as it is."""
        if self._process is not None:
            self.send(how)
            self._process.wait(20)
            self._process = None
