"""An API server for RayJobs alone, over real HTTPS or HTTP, which keeps jobs and can be told to fail."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

TOKEN = "canary.token-0123456789"
PATH = "/apis/ray.io/v1/namespaces/spikefleet/rayjobs"
SUCCEEDS = [("Initializing", ""), ("Running", "RUNNING"), ("Complete", "SUCCEEDED")]
FAILS = [("Running", "RUNNING"), ("Failed", "FAILED")]


class RayJobServer:
    """Jobs by name; each GET of one takes it to the next of `states`, where the last one stays."""

    def __init__(self, states: list[tuple[str, str]]) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.states = states
        self.requests: list[tuple[str, str | None]] = []
        """Method and Authorization of each request."""
        self.faults: dict[tuple[str, int], Any] = {}
        """By method and its how-manieth request, from 0: see `_Handler._fault`."""
        self.stays = 0
        """How many GETs a deleted job survives."""
        self.url = ""

    def put(self, name: str, deployment: str, job: str = "") -> dict[str, Any]:
        """A job that was there before."""
        manifest = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name, "uid": "earlier"}}
        self.jobs[name] = {**manifest, "spec": {}, "status": {"jobDeploymentStatus": deployment, "jobStatus": job}}
        return self.jobs[name]

    def count(self, method: str) -> int:
        return sum(1 for asked, _ in self.requests if asked == method)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        state = self.server.state
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        number = state.count(method)
        state.requests.append((method, self.headers.get("Authorization")))
        fault = state.faults.get((method, number)) or state.faults.get((method, -1))
        if fault is not None and self._fault(fault):
            return
        code, answer = self._act(method, body)
        if fault == "cut after":
            self._cut()
            return
        self._send(code, json.dumps(answer).encode())

    def _fault(self, fault: Any) -> bool:
        """Whether the fault was the answer."""
        if isinstance(fault, int):
            self._send(fault, json.dumps({"kind": "Status", "message": f"planted {fault}"}).encode())
        elif isinstance(fault, bytes):
            self._send(200, fault)
        elif fault == "redirect":
            self.send_response(307)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault == "cut":
            self._cut()
        elif fault == "slow":
            time.sleep(1.0)
            self._cut()
        return fault != "cut after"

    def _cut(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"kind": "RayJ')
        self.close_connection = True

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _act(self, method: str, body: Any) -> tuple[int, dict[str, Any]]:
        state = self.server.state
        assert self.path.startswith(PATH)
        name = body["metadata"]["name"] if method == "POST" else self.path.rpartition("/")[2]
        there = state.jobs.get(name)
        if method == "POST":
            if there is not None:
                return 409, {"kind": "Status", "message": "already exists"}
            metadata = {**body["metadata"], "uid": f"uid-{state.count('POST')}"}
            state.jobs[name] = {**body, "metadata": metadata, "step": 0}
            return 201, state.jobs[name]
        if there is None:
            return 404, {"kind": "Status", "message": "not found"}
        if method == "DELETE":
            if body["preconditions"]["uid"] != there["metadata"]["uid"]:
                return 409, {"kind": "Status", "message": "the UID in the precondition does not match"}
            there["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            there["stays"] = state.stays
            if not state.stays:
                del state.jobs[name]
            return 200, {"kind": "Status", "status": "Success"}
        return 200, self._next(name, there)

    def _next(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        state = self.server.state
        if "stays" in job:
            job["stays"] -= 1
            if job["stays"] <= 0:
                del state.jobs[name]
        elif "step" in job:
            deployment, command = state.states[min(job["step"], len(state.states) - 1)]
            job["step"] += 1
            job["status"] = {"jobDeploymentStatus": deployment, "jobStatus": command, "message": f"is {command}"}
        return job


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    state: RayJobServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        return


def write_account(folder: Path, certificate: bytes | None) -> Path:
    """The files that Kubernetes mounts into a pod."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token").write_text(TOKEN + "\n", encoding="ascii")
    (folder / "namespace").write_text("spikefleet", encoding="ascii")
    if certificate is not None:
        (folder / "ca.crt").write_bytes(certificate)
    return folder


def make_certificate(folder: Path) -> tuple[Path, bytes]:
    """A file with key and certificate for 127.0.0.1, and the certificate alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    ).public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "server.pem"
    path.write_bytes(private + certificate)
    return path, certificate


@contextmanager
def serving(state: RayJobServer, pem: Path | None) -> Iterator[RayJobServer]:
    """Serves while the block runs: HTTPS with a certificate, else HTTP."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.state = state
    if pem is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"{'http' if pem is None else 'https'}://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
