"""The three requests that a pod with the account `retrain` may send to its API server: create, get, delete a RayJob.

The token is read from its file for each request, for the kubelet replaces it; it is sent over HTTPS alone, in a header,
and is part of no message.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from spikefleet.errors import UserError

if TYPE_CHECKING:
    from requests import Response, Session

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes mounts a pod's token, the certificate of its API server and the name of its namespace."""

_TOKEN = re.compile(r"[\w.~+/=-]+", re.ASCII)
_NAMESPACE = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
_SHOWN = 1000  # characters of an answer
_TIMEOUT_S = (10.0, 30.0)  # to connect, and between two parts of an answer

Job = dict[str, Any]
"""A RayJob as JSON."""


class NoAnswerError(RuntimeError):
    """The API server could not be asked, or did not answer in its form; the same request may succeed later."""


class NotUniqueError(RuntimeError):
    """The API server answered 409: there is such a job already, or it is no longer the one that was meant."""


@dataclass
class RayJobs:
    """The RayJobs of a namespace.

    Args:
        server: the API server, such as https://10.0.0.1:443.
        namespace: its name.
        account: directory of the token and of the certificate; ACCOUNT if not given.
        timeout_s: for the connection and between two parts of an answer.
    """

    server: str
    namespace: str
    account: Path
    timeout_s: tuple[float, float] = _TIMEOUT_S
    _session: Session = field(init=False, repr=False)

    def __post_init__(self) -> None:
        import requests

        self._session = requests.Session()
        # Neither a proxy nor a netrc file of the environment may see the token, or replace it.
        self._session.trust_env = False
        authority = self.account / "ca.crt"
        self._session.verify = str(authority) if authority.is_file() else True

    def read(self, name: str) -> Job | None:
        """The job of this name, or None if there is none."""
        response = self._ask("GET", f"/{name}")
        return None if response.status_code == 404 else self._job(response, "get")

    def create(self, manifest: Job) -> Job:
        """Creates a job. Raises NotUniqueError if there is one of its name."""
        response = self._ask("POST", "", manifest)
        if response.status_code == 404:
            raise UserError(
                f"{self.server} knows no RayJobs in the namespace {self.namespace!r}; install KubeRay's operator and "
                "resource definitions, or name another --namespace"
            )
        return self._job(response, "create")

    def delete(self, name: str, uid: str) -> None:
        """Deletes a job and its cluster, if it is still the one with this `uid`. Raises NotUniqueError if it is not."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        response = self._ask("DELETE", f"/{name}", options)
        if response.status_code != 404:
            self._checked(response, "delete")

    def _ask(self, method: str, path: str, body: Job | None = None) -> Response:
        import requests

        url = f"{self.server}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs{path}"
        try:
            # A redirection would take the token elsewhere.
            return self._session.request(
                method, url, json=body, headers=self._headers(), timeout=self.timeout_s, allow_redirects=False
            )
        except requests.exceptions.SSLError as error:
            # The certificate may be about to be replaced, as may the connection.
            raise NoAnswerError(f"no secure connection: {_reason(error)}") from None
        except requests.RequestException as error:
            raise NoAnswerError(_reason(error)) from None

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json"}
        path = self.account / "token"
        if self.server.startswith("https:") and path.exists():
            try:
                token = path.read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read as a token ({type(error).__name__})") from None
            # requests shows a header that it refuses, and this one must not be shown.
            if not _TOKEN.fullmatch(token):
                raise UserError(f"{path}: holds no token: letters, digits and ._~+/=- are allowed, on one line")
            headers["Authorization"] = f"Bearer {token}"
        return headers

    def _job(self, response: Response, verb: str) -> Job:
        found = self._checked(response, verb)
        metadata = found.get("metadata")
        if found.get("kind") != "RayJob" or not isinstance(metadata, dict) or not isinstance(metadata.get("uid"), str):
            raise NoAnswerError(f"the answer is no RayJob but of the kind {str(found.get('kind'))[:40]!r}")
        if not isinstance(found.get("status") or {}, dict):
            raise NoAnswerError("the answer is a RayJob without a readable status")
        return found

    def _checked(self, response: Response, verb: str) -> Job:
        status = response.status_code
        try:
            answer = response.json()
        except ValueError:
            answer = None
        said = answer.get("message") if isinstance(answer, dict) else None
        why = f": {str(said)[:_SHOWN]}" if said else ""
        if status == 401:
            raise UserError(
                f"{self.server} refused the token in {self.account / 'token'} (401){why}; run this in a pod with the "
                "ServiceAccount of k8s/retrain and automountServiceAccountToken: true"
            )
        if status == 403:
            raise UserError(
                f"{self.server} does not allow this account to {verb} rayjobs in {self.namespace!r} (403){why}; apply "
                "the Role and RoleBinding of k8s/retrain, or change what its admission policy names"
            )
        if status == 409:
            raise NotUniqueError(f"409{why}")
        if status == 429 or status >= 500:
            raise NoAnswerError(f"HTTP {status}{why}")
        if status >= 300:
            mend = "correct --template" if verb == "create" else "correct --api-server"
            raise UserError(f"{self.server} refused to {verb} the RayJob (HTTP {status}){why}; {mend}")
        if not isinstance(answer, dict):
            raise NoAnswerError(f"HTTP {status} with an answer that is no JSON object")
        return answer


def in_this_pod(server: str | None, namespace: str | None, account: Path | None = None) -> RayJobs:
    """The RayJobs that this pod may ask for.

    Args:
        server: address of the API server; that of the pod's environment if None.
        namespace: the account's own if None.
        account: ACCOUNT if None.

    Raises:
        UserError: neither the argument nor the pod's environment says where the API server is, or which namespace.
    """
    account = ACCOUNT if account is None else account
    wanted = _own_namespace(account) if namespace is None else namespace
    if not _NAMESPACE.fullmatch(wanted):
        raise UserError(f"--namespace={wanted}: must be 1 to 63 lower-case letters, digits and hyphens")
    return RayJobs(_address(server), wanted, account)


def _address(server: str | None) -> str:
    if server is None:
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise UserError("KUBERNETES_SERVICE_HOST is not set, so this is no pod of a cluster; give --api-server=URL")
        server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    parts = urlsplit(server)
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise UserError(f"--api-server={parts.hostname or server!r}: must be https://HOST:PORT without credentials")
    return server.rstrip("/")


def _own_namespace(account: Path) -> str:
    try:
        return (account / "namespace").read_text(encoding="utf-8").strip()
    except OSError:
        raise UserError(f"{account / 'namespace'} cannot be read, so this is no pod; give --namespace=NAME") from None


def _reason(error: Exception) -> str:
    """The innermost reason: what requests and urllib3 put around it repeats the address."""
    inner: BaseException = error
    while isinstance(cause := getattr(inner, "reason", None) or next(iter(inner.args), None), BaseException):
        inner = cause
    return f"{type(inner).__name__}: {str(inner)[:200]}"
