"""Tracking URIs that name nothing, or need a driver that is missing, are refused before anything starts."""

import sys
from pathlib import Path

import pytest

from spikefleet.cli.doctor import examine
from spikefleet.errors import UserError
from spikefleet.tracking.mlflow_client import check_tracking_uri


@pytest.mark.parametrize(
    "uri",
    [
        "http://", "http://[::1", "https://host:99999999", "sqlite://", "sqlite:///", "sqlite:///:memory:",
        "ftp://host", "runs",
    ],
)  # fmt: skip
def test_what_names_no_server_and_no_file_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="; set it to "):
        check_tracking_uri(uri)


@pytest.mark.parametrize(
    "uri", ["http://[::1]:5000", "https://u:p@host/path", "sqlite:////tmp/a b.db", "sqlite:///x.db"]
)
def test_what_names_one_is_taken(uri: str) -> None:
    check_tracking_uri(uri)


@pytest.mark.parametrize("scheme", ["postgresql+nothing", "mysql+nothing", "mssql+nothing"])
def test_a_missing_driver_is_named_without_the_password(scheme: str) -> None:
    uri = f"{scheme}://user:secret@host/db"
    with pytest.raises(UserError, match=r"cannot be used: .*nothing; install the driver") as caught:
        check_tracking_uri(uri)
    assert "secret" not in str(caught.value)


def test_the_extra_is_named_where_the_driver_of_postgresql_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "postgresql://user:secret@host/db"
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"cannot be used: .*; install the extra spikefleet\[server\] into") as caught:
        check_tracking_uri(uri)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.delitem(sys.modules, "psycopg")
    pytest.importorskip("psycopg")
    check_tracking_uri(uri)


def test_doctor_names_them_and_runs_that_are_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[::1")
    (tmp_path / "file").write_text("")
    findings = {finding.subject: finding for finding in examine(tmp_path / "file")}
    assert (findings["tracking"].verdict, findings["runs"].verdict) == ("bad", "bad")
    assert findings["runs"].text.endswith("is no directory")
    assert {finding.subject: finding.verdict for finding in examine(tmp_path)}["runs"] != "bad"
