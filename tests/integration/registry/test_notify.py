"""Webhooks of a real MLflow server, taken by the receiver of the README; what cannot work costs one sentence."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.errors import UserError
from spikefleet.registry.api import promote
from spikefleet.registry.leftovers import find_leftovers, remove_leftovers
from spikefleet.registry.verification import verify
from spikefleet.registry.webhooks import list_notifications, notify, refusal, stop_notifying
from support.mlflow_server import Server
from support.registered import Trained, trained

SECRET = "a secret of more than 16 characters"
README = Path(__file__).parents[3] / "platform" / "README.md"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_CACHE_TTL", "1")
    with Server(tmp_path) as server:
        server.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server.uri


@pytest.fixture
def heard() -> list[str]:
    """What the receiver has printed."""
    return []


@pytest.fixture
def address(heard: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the receiver of the README listens."""
    monkeypatch.setenv("SPIKEFLEET_WEBHOOK_SECRET", SECRET)
    (code,) = re.findall(r"^```python\n(# receiver\.py\n.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    names: dict[str, Any] = {"__name__": "receiver"}
    names["print"] = lambda *words, **_: heard.append(" ".join(map(str, words)))
    exec(code, names)
    with HTTPServer(("127.0.0.1", 0), names["Receiver"]) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/spikefleet"
        http.shutdown()
        thread.join()


def command(*words: str, **environment: str) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "300", **environment}).invoke(app, ["registry", *words])
    assert SECRET not in done.output
    return done.exit_code, done.output


def test_a_server_tells_the_receiver_of_versions_and_aliases(
    server: str, address: str, heard: list[str], tmp_path: Path
) -> None:
    code, said = command("notify", address, "--test")
    assert code == 0, said
    assert "the example message arrived" in said
    assert heard.pop().startswith("model_version_alias created ")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(address, data=b"{}", timeout=5)

    origin = trained(tmp_path, server)
    version = origin.register("told")
    assert promote("told", version.version, "val/top1", tracking_uri=server).alias == "champion"
    deadline = time.monotonic() + 20
    while len(heard) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    created, moved = sorted(heard)
    assert created.startswith("model_version created {'name': 'told', 'version': '1'")
    assert moved.startswith("model_version_alias created ")
    assert "'alias': 'champion'" in moved

    assert command("notify", address)[0] == 0
    (kept,) = list_notifications(tracking_uri=server)
    assert (kept.url, kept.status) == (address, "ACTIVE")
    assert json.loads(command("notify", "--list", "--json")[1])[0]["id"] == kept.webhook_id
    code, said = command("notify", address, "--test", "--secret-env", "OTHER", OTHER="another secret of 16 characters")
    assert code == 1
    assert "the example message did not arrive: the address answered with status 403" in said
    code, said = command("notify", "https://example.org/x")
    assert code == 2
    assert "webhook refused" in said
    assert command("notify", address, "--remove")[0] == 0
    assert list_notifications(tracking_uri=server) == []
    with pytest.raises(UserError, match=r"no webhook of spikefleet has the address or id .*; none exist"):
        stop_notifying(address, tracking_uri=server)

    everything_else_works_behind_a_server(origin, server)


def everything_else_works_behind_a_server(origin: Trained, uri: str) -> None:
    """Starting a server takes seconds, so that verification and removal behind one are tested here."""
    assert verify("models:/told@champion", tracking_uri=uri).intact
    client = MlflowClient(uri, registry_uri=uri)
    client.delete_registered_model_alias("told", "champion")
    client.delete_model_version("told", "1")
    (left,) = find_leftovers(least_age_s=0, tracking_uri=uri).found
    assert left.size > 100_000
    assert [one.model_id for one in remove_leftovers([left], tracking_uri=uri)] == [left.model_id]
    assert find_leftovers(least_age_s=0, tracking_uri=uri).found == ()


def test_a_registry_without_a_server_sends_nothing(uri: str) -> None:
    with pytest.raises(UserError, match="webhooks are sent by an MLflow server, and the registry is the database"):
        notify("https://example.org", SECRET, tracking_uri=uri)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://example.org/x", "takes https only"),
        ("https://127.0.0.1/x", "public addresses only"),
        ("https://10.0.0.7/x", "public addresses only"),
    ],
)
def test_what_mlflow_refuses_costs_a_sentence(first: Trained, url: str, sentence: str) -> None:
    client = MlflowClient(first.uri, registry_uri=first.uri)
    with pytest.raises(MlflowException) as caught:
        client.create_webhook("spikefleet", url, events=["model_version.created"], secret=SECRET)
    assert sentence in (refusal(str(caught.value)) or "")
    assert "does not know its host" in (refusal("Cannot resolve Webhook URL hostname 'x': unknown") or "")
    assert refusal("INTERNAL_ERROR: the database is locked") is None


@pytest.mark.parametrize("url", ["ftp://example.org", "https://", "example.org/x", "https://h:0/x", "https://h:x/x"])
def test_an_address_that_is_none_is_refused_before_the_server_is_asked(url: str) -> None:
    with pytest.raises(UserError, match="is no address for a webhook; expected https://HOST/PATH"):
        notify(url, SECRET, tracking_uri="http://127.0.0.1:1")


def test_the_secret_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKEFLEET_WEBHOOK_SECRET", raising=False)
    code, said = command("notify", "https://example.org/x")
    assert code == 2
    assert "the environment variable SPIKEFLEET_WEBHOOK_SECRET is not set" in said
    code, said = command("notify", "https://example.org/x", SPIKEFLEET_WEBHOOK_SECRET="short")
    assert code == 2
    assert "the secret has 5 characters, expected at least 16" in said
    for words in ((), ("--list", "https://example.org/x"), ("--list", "--test"), ("--list", "--remove")):
        assert command("notify", *words, SPIKEFLEET_WEBHOOK_SECRET=SECRET)[0] == 2, words
