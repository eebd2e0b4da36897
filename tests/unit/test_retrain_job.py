"""`spikefleet retrain-job` against an API server over HTTPS: states, refusals, and answers that do not come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from spikefleet.errors import RunError, UserError
from spikefleet.retraining.kubernetes_api import NoAnswerError, RayJobs, in_this_pod
from spikefleet.retraining.rayjob import Retrainer, read_template
from support.rayjob_server import FAILS, SUCCEEDS, TOKEN, RayJobServer, make_certificate, serving, write_account

NAME = "retrain-digits"
TEMPLATE = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": NAME}, "spec": {"entrypoint": "true"}}


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(pem: tuple[Path, bytes]) -> Iterator[RayJobServer]:
    with serving(RayJobServer(SUCCEEDS), pem[0]) as state:
        yield state


@pytest.fixture
def account(tmp_path: Path, pem: tuple[Path, bytes]) -> Path:
    return write_account(tmp_path / "account", pem[1])


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "rayjob.yaml"
    path.write_text(yaml.safe_dump(TEMPLATE), encoding="utf-8")
    return path


class Followed:
    """A retrainer with its lines."""

    def __init__(self, server: RayJobServer, account: Path, template: Path, patience_s: float = 5.0) -> None:
        self.lines: list[str] = []
        jobs = RayJobs(server.url, "spikefleet", account, timeout_s=(0.5, 0.5))
        manifest = read_template(template, "spikefleet")
        self.retrainer = Retrainer(jobs, manifest, self.lines.append, poll_s=0.01, patience_s=patience_s)

    def run(self) -> str:
        return self.retrainer.run()


@pytest.fixture
def followed(server: RayJobServer, account: Path, template: Path) -> Followed:
    return Followed(server, account, template)


def test_a_job_is_created_and_followed_with_a_line_for_each_state(server: RayJobServer, followed: Followed) -> None:
    server.states = [("Initializing", ""), ("Running", "RUNNING"), ("Running", "RUNNING"), ("Complete", "SUCCEEDED")]
    assert followed.run() == f"succeeded: RayJob {NAME}"
    assert followed.lines == [
        f"created RayJob {NAME} in spikefleet",
        f"RayJob {NAME}: Initializing",
        f"RayJob {NAME}: Running, job RUNNING",
        f"RayJob {NAME}: Complete, job SUCCEEDED",
    ]
    assert server.jobs[NAME]["metadata"]["namespace"] == "spikefleet"
    assert server.jobs[NAME]["spec"] == TEMPLATE["spec"]
    assert server.count("DELETE") == 0
    assert {authorization for _, authorization in server.requests} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("end", [("Failed", "FAILED"), ("Complete", "STOPPED"), ("ValidationFailed", "")])
def test_a_job_that_did_not_succeed_failed(end: tuple[str, str], server: RayJobServer, followed: Followed) -> None:
    server.states = [("Running", "RUNNING"), end]
    with pytest.raises(RunError, match=f"RayJob {NAME} failed: {end[0]}.*: is {end[1]}"):
        followed.run()


@pytest.mark.parametrize("state", ["", "Initializing", "Running", "Retrying", "Suspended", "Waiting"])
def test_a_job_that_has_not_ended_is_left_alone(state: str, server: RayJobServer, followed: Followed) -> None:
    server.put(NAME, state)
    assert followed.run() == f"skipped: RayJob {NAME} has not ended yet"
    assert server.count("POST") == server.count("DELETE") == 0
    assert not followed.retrainer.created


@pytest.mark.parametrize("state", ["Complete", "Failed", "ValidationFailed"])
@pytest.mark.parametrize("stays", [0, 3])
def test_a_job_that_has_ended_is_replaced(state: str, stays: int, server: RayJobServer, followed: Followed) -> None:
    server.put(NAME, state, "SUCCEEDED")
    server.stays = stays
    assert followed.run().startswith("succeeded")
    assert followed.lines[0] == f"deleted RayJob {NAME}, which ended as {state}, job SUCCEEDED"
    assert server.count("DELETE") == server.count("POST") == 1


def test_a_job_that_is_being_deleted_is_waited_for(server: RayJobServer, followed: Followed) -> None:
    server.put(NAME, "Running")["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    server.jobs[NAME]["stays"] = 3
    assert followed.run().startswith("succeeded")
    assert server.count("DELETE") == 0


def test_of_two_at_once_one_is_skipped(server: RayJobServer, account: Path, template: Path) -> None:
    """Each sees no job; the API server lets one create it."""
    first, second = Followed(server, account, template), Followed(server, account, template)
    create = first.retrainer._jobs.create

    def create_second(manifest: dict[str, Any]) -> dict[str, Any]:
        server.states = [("Running", "RUNNING")]
        second.retrainer._jobs.create(manifest | {"metadata": {"name": NAME}})
        return create(manifest)

    first.retrainer._jobs.create = create_second  # type: ignore[method-assign]
    assert first.run() == f"skipped: RayJob {NAME} has not ended yet"


def test_a_job_that_another_scheduler_put_anew_is_not_deleted(server: RayJobServer, followed: Followed) -> None:
    ended = server.put(NAME, "Complete", "SUCCEEDED")
    read = followed.retrainer._jobs.read

    def read_then_replaced(name: str) -> dict[str, Any] | None:
        found = read(name)
        server.jobs[NAME] = ended | {"metadata": {"name": NAME, "uid": "later"}}
        return found

    followed.retrainer._jobs.read = read_then_replaced  # type: ignore[method-assign]
    assert followed.run().startswith("skipped")
    assert server.jobs[NAME]["metadata"]["uid"] == "later"


PASSING = [500, 503, 429, "cut", "slow", b"{", b"[]", b'{"kind": "List"}', b'{"kind": "RayJob", "metadata": {}}']


CASES = [
    (where, fault)
    for where in [("GET", 0), ("GET", 2), ("POST", 0), ("DELETE", 0)]
    for fault in (PASSING if where[0] != "DELETE" else PASSING[:7])  # any JSON object answers a DELETE
]


@pytest.mark.parametrize(("where", "fault"), CASES, ids=str)
def test_what_passes_is_asked_again(
    where: tuple[str, int], fault: Any, server: RayJobServer, followed: Followed
) -> None:
    server.put(NAME, "Complete", "SUCCEEDED")
    server.faults[where] = fault
    assert followed.run().startswith("succeeded")
    assert any("does not answer (" in line and "asking again" in line for line in followed.lines)
    assert any("answers again" in line for line in followed.lines)
    assert server.count(where[0]) >= 2


def test_a_create_whose_answer_is_lost_is_followed(server: RayJobServer, followed: Followed) -> None:
    server.faults["POST", 0] = "cut after"
    assert followed.run().startswith("succeeded")
    assert server.count("POST") == 2
    assert followed.lines[-1] == f"RayJob {NAME}: Complete, job SUCCEEDED"


def test_an_api_server_that_stays_away_ends_it(server: RayJobServer, account: Path, template: Path) -> None:
    followed = Followed(server, account, template, patience_s=0.2)
    server.faults = {("GET", number): 503 for number in range(2, 1000)}
    with pytest.raises(
        RunError, match=rf"did not answer for 0 s \(HTTP 503: planted 503\); RayJob {NAME} keeps running"
    ):
        followed.run()
    assert sum("does not answer" in line for line in followed.lines) == 1


@pytest.mark.parametrize(
    ("where", "code", "sentence"),
    [
        (("GET", 0), 401, "refused the token in .*token.*ServiceAccount of k8s/retrain"),
        (("GET", 3), 401, "refused the token"),
        (("GET", 0), 403, r"not allow this account to get rayjobs in 'spikefleet' \(403\): planted 403"),
        (("POST", 0), 403, "not allow this account to create rayjobs"),
        (("DELETE", 0), 403, "not allow this account to delete rayjobs"),
        (("POST", 0), 404, "knows no RayJobs in the namespace 'spikefleet'"),
        (("POST", 0), 422, r"refused to create the RayJob \(HTTP 422\): planted 422; correct --template"),
        (("POST", 0), "redirect", r"HTTP 307"),
    ],
)
def test_refusals_are_said(
    where: tuple[str, int], code: Any, sentence: str, server: RayJobServer, followed: Followed
) -> None:
    server.put(NAME, "Complete", "SUCCEEDED")
    server.faults[where] = code
    with pytest.raises(UserError, match=sentence) as caught:
        followed.run()
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_job_that_goes_while_it_is_followed_is_an_error(
    replaced: bool, server: RayJobServer, followed: Followed
) -> None:
    read = followed.retrainer._jobs.read

    def read_another(name: str) -> dict[str, Any] | None:
        found = read(name)
        if followed.retrainer.created and found is not None:
            return found | {"metadata": {"name": NAME, "uid": "another"}} if replaced else None
        return found

    followed.retrainer._jobs.read = read_another  # type: ignore[method-assign]
    with pytest.raises(RunError, match="was replaced before" if replaced else "was deleted before"):
        followed.run()


def test_the_token_goes_only_to_the_server_whose_certificate_is_known(
    server: RayJobServer, tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = make_certificate(tmp_path)
    strange = write_account(tmp_path / "other", other)
    with pytest.raises(NoAnswerError, match="no secure connection"):
        RayJobs(server.url, "spikefleet", strange).read(NAME)
    assert server.requests == []
    with serving(RayJobServer(SUCCEEDS), None) as plain:
        assert RayJobs(plain.url, "spikefleet", strange).read(NAME) is None
        assert plain.requests == [("GET", None)]


def test_a_proxy_of_the_environment_is_not_asked(
    server: RayJobServer, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert RayJobs(server.url, "spikefleet", account).read(NAME) is None


def test_a_file_that_is_no_token_is_not_shown(server: RayJobServer, account: Path) -> None:
    (account / "token").write_text("secret\nword", encoding="ascii")
    with pytest.raises(UserError, match="holds no token") as caught:
        RayJobs(server.url, "spikefleet", account).read(NAME)
    assert "secret" not in str(caught.value)


def test_a_token_that_was_replaced_is_read_again(server: RayJobServer, account: Path) -> None:
    jobs = RayJobs(server.url, "spikefleet", account)
    jobs.read(NAME)
    (account / "token").write_text("another", encoding="ascii")
    jobs.read(NAME)
    assert [authorization for _, authorization in server.requests] == [f"Bearer {TOKEN}", "Bearer another"]


def test_where_the_pod_is(account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UserError, match="give --api-server=URL"):
        in_this_pod(None, None, account)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    assert in_this_pod(None, None, account).server == "https://[fd00::1]:6443"
    assert in_this_pod("https://api:1/", None, account).server == "https://api:1"
    assert in_this_pod(None, None, account).namespace == "spikefleet"
    with pytest.raises(UserError, match="give --namespace=NAME"):
        in_this_pod(None, None, tmp_path)
    for wrong in ("../default", "", "A", "-a", "a" * 64):
        with pytest.raises(UserError, match="--namespace="):
            in_this_pod(None, wrong, account)
    for wrong in ("ftp://x", "x:1", "https://", "https://me:word@api"):
        with pytest.raises(UserError, match="--api-server=") as caught:
            in_this_pod(wrong, "spikefleet", account)
        assert "word" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "Job"}, "must be one RayJob of ray.io/v1"),
        ({"metadata": {}}, "metadata.name None: must be retrain-MODEL"),
        ({"metadata": {"name": "digits"}}, "must be retrain-MODEL"),
        ({"metadata": {"name": "retrain-"}}, "must be retrain-MODEL"),
        ({"metadata": {"name": "retrain-Digits"}}, "must be retrain-MODEL"),
        ({"metadata": {"name": "retrain-a_b"}}, "must be retrain-MODEL"),
        ({"metadata": {"name": "retrain-a-"}}, "must be retrain-MODEL"),
        ({"metadata": {"name": "retrain-" + "a" * 40}}, "at most 47 characters"),
        ({"metadata": {"name": NAME, "namespace": "default"}}, "'default': must be 'spikefleet'"),
        ({"spec": None}, "spec is missing"),
    ],
)
def test_templates_that_are_refused(change: dict[str, Any], sentence: str, template: Path) -> None:
    template.write_text(yaml.safe_dump(TEMPLATE | change), encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        read_template(template, "spikefleet")


def test_a_name_of_47_characters_is_allowed_and_what_is_no_yaml_is_refused(template: Path) -> None:
    name = "retrain-" + "a" * 39
    template.write_text(yaml.safe_dump(TEMPLATE | {"metadata": {"name": name}}), encoding="utf-8")
    assert read_template(template, "spikefleet")["metadata"] == {"name": name, "namespace": "spikefleet"}
    for text in ("a: [", "a: b\n---\nc: d", "- 1", ""):
        template.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="--template="):
            read_template(template, "spikefleet")
    with pytest.raises(UserError, match="cannot be read"):
        read_template(template.parent, "spikefleet")


COMMAND = """
import sys
from pathlib import Path
from spikefleet.cli import main
from spikefleet.retraining import kubernetes_api, rayjob
kubernetes_api.ACCOUNT, rayjob.POLL_S = Path(sys.argv.pop(1)), 0.05
main()
"""


def start(server: RayJobServer, account: Path, template: Path) -> subprocess.Popen[str]:
    words = ["retrain-job", "--template", str(template), "--api-server", server.url]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(account), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_exit_codes_of_the_command_and_its_last_line(server: RayJobServer, account: Path, template: Path) -> None:
    out, err = (run := start(server, account, template)).communicate(timeout=60)
    assert (run.returncode, out.splitlines()[-1], err) == (0, f"succeeded: RayJob {NAME}", "")
    server.states = FAILS
    out, err = (run := start(server, account, template)).communicate(timeout=60)
    assert run.returncode == 1
    assert err == f"error: RayJob {NAME} failed: Failed, job FAILED: is FAILED\n"
    assert TOKEN not in out + err


def test_sigterm_ends_the_following_and_not_the_job(server: RayJobServer, account: Path, template: Path) -> None:
    server.states = [("Running", "RUNNING")]
    run = start(server, account, template)
    until = time.monotonic() + 60
    while server.count("GET") < 4 and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 143
    assert err == f"interrupted: no longer following; RayJob {NAME} keeps running\n"
    assert NAME in server.jobs
    assert server.count("DELETE") == 0
    assert TOKEN not in out + err
