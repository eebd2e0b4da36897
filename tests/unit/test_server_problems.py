"""A tracking server that cannot be used is a sentence: the address, the cause, the request, what to do."""

from __future__ import annotations

import http.server
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.errors import UserError
from spikefleet.registry import list_models
from spikefleet.registry.mlflow_store import connect
from spikefleet.tracking.mlflow_client import check_tracking_uri, public_uri
from spikefleet.tracking.relocation import ready_database
from spikefleet.tracking.server_problems import database_problem, server_cause, server_problem


@contextmanager
def answering(code: int) -> Iterator[str]:
    """The address of a server that answers everything with a page of HTML."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>" + b"hello " * 200)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def sentence_at(uri: str) -> str:
    with pytest.raises(UserError) as caught:
        list_models(tracking_uri=uri)
    assert public_uri(uri) in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (200, "no MLflow server"),
        (401, "refuses the credentials (HTTP 401)"),
        (403, "refuses the credentials (HTTP 403)"),
        (404, "no MLflow server"),
        (500, "an internal error (HTTP 500)"),
        (503, "an internal error (HTTP 503)"),
    ],
)
def test_what_answers_is_no_tracking_server_for_us(code: int, cause: str) -> None:
    with answering(code) as uri:
        assert cause in sentence_at(uri)


def test_nothing_answers() -> None:
    with answering(200) as uri:
        pass
    said = sentence_at(uri.replace("//", "//user:secret@"))
    assert "the connection is refused (asked for model-versions/search); start it, or check MLFLOW_TRACKING_URI" in said
    assert "secret" not in said
    assert "no connection by TLS" in sentence_at_tls()


def sentence_at_tls() -> str:
    with answering(200) as uri:
        return sentence_at(uri.replace("http:", "https:"))


def test_a_server_of_a_command(tmp_path: Path) -> None:
    with answering(200) as uri:
        pass
    done = CliRunner(env={"MLFLOW_TRACKING_URI": uri}).invoke(app, ["registry", "list", "--runs-dir", str(tmp_path)])
    assert done.exit_code == 2
    assert "the connection is refused" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("quoted", "cause"),
    [
        ("HTTPConnectionPool(host='h', port=5): Read timed out. (read timeout=20)", "no answer comes in time"),
        ("API request to http://h/api failed with exception NameResolutionError(...)", "its host name is not known"),
        ("('Connection aborted.', RemoteDisconnected('Remote end closed'))", "the connection breaks"),
    ],
)
def test_other_causes(quoted: str, cause: str) -> None:
    found = server_cause(OSError(quoted))
    assert found is not None
    assert found[0] == cause


def test_other_errors_stay_what_they_are() -> None:
    """Negative control: what a server that works says, and errors of files."""
    for text in ("Run 'x' not found", "[Errno 111] Connection refused", "API request to x failed: a name is too long"):
        assert server_problem(OSError(text), "http://h:5000") is None


@pytest.mark.parametrize("uri", ["http://", "https://:5000", "http://h:99999", "http://[::1"])
def test_an_address_without_a_host_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="names no host"):
        check_tracking_uri(uri)
    check_tracking_uri("http://[::1]:5000")


@pytest.mark.parametrize(
    ("pragma", "says"),
    [
        ("max_page_count = 1", r"mlflow\.db cannot be written: the disk at .* is full .* free space there"),
        ("query_only = 1", r"mlflow\.db cannot be written: it, or its disk, is read-only; make it writable"),
    ],
)
def test_a_database_that_cannot_be_written_is_named_with_its_remedy(pragma: str, says: str, tmp_path: Path) -> None:
    """SQLite's own limit of pages stands for a full disk, and its read-only mode for a disk that is mounted so."""
    database = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(f"PRAGMA {pragma}")
        with pytest.raises(sqlite3.OperationalError) as refused:
            connection.execute("CREATE TABLE runs (name TEXT)")
    sentence = database_problem(OSError(f"(sqlite3.OperationalError) {refused.value}"), database)
    assert sentence is not None
    assert re.search(says, sentence), sentence
    assert database_problem(OSError(str(refused.value)), database) is None  # of another library
    assert database_problem(OSError("(sqlite3.OperationalError) no such table: runs"), database) is None


def test_an_error_of_the_database_is_one_sentence_without_mlflows_stack(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    ready_database(uri)
    with connect(uri) as client:
        client.search_registered_models()  # opens the database
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("DROP TABLE registered_models")
    with pytest.raises(UserError, match="no such table: registered_models"), connect(uri):
        client.create_registered_model("x")
    assert "Traceback" not in capfd.readouterr().err
