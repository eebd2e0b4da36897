"""Webhooks of MLflow: its server tells an address of new versions and of aliases that move.

The server sends them, for what is done through it: a registry that is opened as a database sends none. Each message is
signed: `X-MLflow-Signature` is `v1,` and the base64 form of HMAC-SHA256 with the secret over
`delivery_id.timestamp.body`. Nothing of spikefleet depends on them; in MLflow they are experimental.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from spikefleet.errors import UserError
from spikefleet.registry.mlflow_store import connect
from spikefleet.registry.package_access import registry_uri
from spikefleet.tracking.mlflow_client import public_uri
from spikefleet_tune.messages import one_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.webhook import Webhook

EVENTS: tuple[Literal["model_version_alias.created", "model_version.created"], ...] = (
    "model_version_alias.created",
    "model_version.created",
)
"""What is reported: a version got an alias (MLflow sends it when one moves too), and a version was registered."""

_NAME = "spikefleet"
_LEAST_SECRET = 16
_PAGE = 100

_REFUSED = (
    (
        re.compile(r"Invalid webhook URL scheme"),
        "the server takes https only; use an https address, or start the server with "
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https",
    ),
    (
        re.compile(r"Cannot resolve|timed? ?out resolving", re.IGNORECASE),
        "the server does not know its host ({})",
    ),
    (
        re.compile(r"non-public|private", re.IGNORECASE),
        "the server sends to public addresses only ({}); to allow others, start it with "
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true",
    ),
    (
        re.compile(r"not (?:supported|implemented)|FileStore|ENDPOINT_NOT_FOUND|error code 404|NotImplementedError"),
        "this server has no webhooks: it needs MLflow 3.3 or later and a database (--backend-store-uri sqlite or "
        "postgresql)",
    ),
)
"""What MLflow's server answers, and what to do, in words."""


@dataclass(frozen=True)
class Notification:
    """A webhook, without its secret."""

    webhook_id: str
    url: str
    """Without user name and password."""
    events: tuple[str, ...]
    status: str
    created: datetime

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "id": self.webhook_id,
            "url": self.url,
            "events": list(self.events),
            "status": self.status,
            "created": self.created.isoformat(),
        }


def notify(url: str, secret: str, *, tracking_uri: str | None = None) -> Notification:
    """Has the server tell `url` of new versions and aliases; an address that has a webhook gets the new secret.

    Args:
        url: where the server posts to.
        secret: signs each message, of at least 16 characters.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Raises:
        UserError: the address or the secret cannot be used, the registry is no server, or the server refuses.
    """
    _check_url(url)
    if len(secret) < _LEAST_SECRET:
        raise UserError(
            f"the secret has {len(secret)} characters, expected at least {_LEAST_SECRET}; make one, for example by "
            "`openssl rand -hex 32`"
        )
    with _server(tracking_uri) as client:
        for one in _all(client):
            if one.url == url and _is_ours(one):
                return _read(client.update_webhook(one.webhook_id, secret=secret, events=list(EVENTS), status="ACTIVE"))
        return _read(client.create_webhook(_NAME, url, events=list(EVENTS), secret=secret))


def list_notifications(*, tracking_uri: str | None = None) -> list[Notification]:
    """The webhooks that spikefleet made, the oldest first. Raises UserError as `notify` does."""
    with _server(tracking_uri) as client:
        return sorted((_read(one) for one in _all(client) if _is_ours(one)), key=lambda one: one.created)


def send_test(webhook_id: str, *, tracking_uri: str | None = None) -> str | None:
    """Has the server send an example message now.

    Args:
        webhook_id: of the webhook.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Returns:
        Why it was not taken, in words; None if it was.

    Raises:
        UserError: as for `notify`.
    """
    with _server(tracking_uri) as client:
        answer = client.test_webhook(webhook_id, EVENTS[0])
    if answer.success:
        return None
    if answer.response_status:
        return f"the address answered with status {answer.response_status}"
    return f"the server could not send: {(answer.error_message or 'no reason given').splitlines()[0][:300]}"


def stop_notifying(address: str, *, tracking_uri: str | None = None) -> list[Notification]:
    """Removes webhooks that spikefleet made.

    Args:
        address: URL or id of the webhook.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Returns:
        Those that were removed.

    Raises:
        UserError: there is none, or as for `notify`.
    """
    with _server(tracking_uri) as client:
        ours = [one for one in _all(client) if _is_ours(one)]
        removed = [one for one in ours if address in (one.url, one.webhook_id)]
        if not removed:
            raise UserError(
                f"no webhook of spikefleet has the address or id {public_uri(address)[:200]!r}; "
                f"{one_of(one.webhook_id for one in ours)}"
            )
        for one in removed:
            client.delete_webhook(one.webhook_id)
        return [_read(one) for one in removed]


@contextmanager
def _server(tracking_uri: str | None) -> Iterator[MlflowClient]:
    """A client of the registry's server. Raises UserError: the registry is no server, or it refuses."""
    uri = registry_uri(tracking_uri)
    if not uri.startswith("http"):
        raise UserError(
            f"webhooks are sent by an MLflow server, and the registry is the database {public_uri(uri)}, which sends "
            "none; start `mlflow server` on it and set MLFLOW_TRACKING_URI to its address"
        )
    with connect(uri) as client:
        from mlflow.exceptions import MlflowException

        try:
            yield client
        except MlflowException as error:
            if (sentence := refusal(str(error))) is not None:
                raise UserError(f"webhook refused: {sentence}") from error
            raise


def refusal(reason: str) -> str | None:
    """What to do about an answer of MLflow's server, in words; None for one that is not about webhooks."""
    first = reason.partition("\n")[0][:300]
    return next((sentence.format(first) for pattern, sentence in _REFUSED if pattern.search(first)), None)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"{public_uri(url)[:200]!r} is no address for a webhook; expected https://HOST/PATH")


def _all(client: MlflowClient) -> Iterator[Webhook]:
    token = None
    while True:
        page = client.list_webhooks(_PAGE, token)
        yield from page
        if not (token := page.token):
            return


def _is_ours(webhook: Webhook) -> bool:
    return bool(webhook.name == _NAME)


def _read(webhook: Webhook) -> Notification:
    return Notification(
        webhook.webhook_id,
        public_uri(webhook.url),
        tuple(map(str, webhook.events)),
        str(webhook.status),
        datetime.fromtimestamp(webhook.creation_timestamp / 1000, UTC),
    )
