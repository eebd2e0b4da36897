"""A PostgreSQL server of a test's own, which refuses to run as root: then as the user nobody."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

USER = "spikefleet"


def missing() -> str | None:
    """Why no PostgreSQL can be started here; None if one can."""
    if shutil.which("pg_ctl") is None:
        return "pg_ctl is not on the PATH"
    if find_spec("psycopg") is None:
        return "the driver psycopg is not installed (spikefleet[server])"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "PostgreSQL does not run as root, and there is no setpriv to become another user"
    return None


@contextmanager
def postgres() -> Iterator[str]:
    """Starts a server with an empty database and yields its URI; it listens on this machine alone."""
    found = shutil.which("pg_ctl")
    assert found is not None
    programs = Path(found).resolve().parent  # with initdb beside it
    with tempfile.TemporaryDirectory(prefix="spikefleet-pg-") as scratch, socket.socket() as free:
        directory = Path(scratch)
        data, log = directory / "data", directory / "log"
        as_user: list[str] = []
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(directory, nobody.pw_uid, nobody.pw_gid)
            as_user = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()

        def call(program: str, *options: str) -> None:
            command = [*as_user, str(programs / program), "-D", str(data), *options]
            done = subprocess.run(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")

        call("initdb", "--auth=trust", f"--username={USER}", "--no-sync", "--encoding=UTF8", "--locale=C")
        options = f"-h 127.0.0.1 -p {port} -k {directory} -c fsync=off -c full_page_writes=off"
        call("pg_ctl", "-w", "-l", str(log), "-o", options, "start")
        try:
            yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
