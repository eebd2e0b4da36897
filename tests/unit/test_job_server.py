"""The Jobs API from its client's side: whose job is whose, and logs over connections that break."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from spikefleet.errors import RunError, UserError
from spikefleet.jobs import server as server_module
from spikefleet.jobs.server import JobServer
from spikefleet.jobs.stopping import stop_job
from spikefleet.jobs.submission import Submission
from spikefleet.jobs.submitting import submit_or_follow
from spikefleet.status import silent

ADDRESS = "http://127.0.0.1:8265"


class Details:
    """What Ray's client says of a job."""

    def __init__(self, submission: str, metadata: Mapping[str, str], status: str) -> None:
        self.submission_id, self.metadata, self.status = submission, metadata, status
        self.entrypoint, self.driver_exit_code, self.message = "", None, ""
        self.start_time, self.end_time = 1000, None


class Client:
    """Ray's client of a cluster that keeps jobs in memory; parts of the log until connections break."""

    def __init__(self) -> None:
        self.known: dict[str, Details] = {}
        self.connections: list[list[str]] = []
        self.whole = ""
        self.deletes = False

    def get_job_info(self, submission: str) -> Details:
        if submission not in self.known:
            raise RuntimeError("Request failed with status code 404: no such job")
        return self.known[submission]

    def submit_job(self, *, submission_id: str, metadata: dict[str, str], **_: Any) -> str:
        self.known[submission_id] = Details(submission_id, metadata, "RUNNING")
        return submission_id

    def stop_job(self, submission: str) -> None:
        if self.deletes:
            del self.known[submission]

    def get_job_logs(self, submission: str) -> str:
        return self.whole

    async def tail_job_logs(self, submission: str) -> AsyncIterator[str]:
        for part in self.connections.pop(0):
            await asyncio.sleep(0)
            if part == "breaks":
                raise OSError("connection reset by peer")
            if part == "ends":
                self.known[submission].status = "SUCCEEDED"
            else:
                yield part


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def server(client: Client, monkeypatch: pytest.MonkeyPatch) -> JobServer:
    monkeypatch.setattr(server_module, "_LOOK_S", 0.0)
    monkeypatch.setattr(server_module, "_RETRY_S", 0.0)
    made = object.__new__(JobServer)  # its constructor connects
    made.address = ADDRESS
    vars(made)["_client"] = client
    return made


def submission(run: str, digest: str = "d") -> Submission:
    return Submission("train", run, ("train", "digits", "--name", run), digest)


def test_a_run_whose_name_ends_like_an_attempt_is_another_run(server: JobServer, client: Client) -> None:
    first, _ = submit_or_follow(server, submission("exp"))
    client.known[first.id].status = "SUCCEEDED"
    other, _ = submit_or_follow(server, submission("exp-2"))
    assert (first.id, other.id) == ("train-exp", "train-exp-2")
    again, new = submit_or_follow(server, submission("exp"))
    assert (again.id, again.run, new) == ("train-exp-3", "exp", True)
    assert submit_or_follow(server, submission("exp"))[0].id == "train-exp-3", "the job that runs is found again"
    with pytest.raises(UserError, match=r"job train-exp-3 works on train 'exp' with another configuration"):
        submit_or_follow(server, submission("exp", digest="other"))
    followed, new = submit_or_follow(server, submission("exp-2"))
    assert (followed.id, new) == ("train-exp-2", False)


def test_names_that_an_id_does_not_tell_apart_are_two_runs(server: JobServer) -> None:
    jobs = [submit_or_follow(server, Submission("data-prepare", run, (), "d"))[0] for run in ("a b", "a+b", "a b")]
    assert [(job.id, job.run) for job in jobs] == [
        ("data-prepare-a-b", "a b"),
        ("data-prepare-a-b-2", "a+b"),
        ("data-prepare-a-b", "a b"),
    ]


def following(server: JobServer, client: Client, connections: list[list[str]], whole: str) -> str:
    """What is printed of a job's log."""
    submit_or_follow(server, submission("exp"))
    client.connections, client.whole = connections, whole
    printed: list[str] = []
    server.follow("train-exp", printed.append)
    return "".join(printed)


def test_connections_that_break_print_nothing_twice(server: JobServer, client: Client) -> None:
    connections = [["one\n", "two\n", "breaks"], ["one\ntwo\n", "thr", "breaks"], ["one\ntwo\nthree\n", "ends"]]
    whole = "one\ntwo\nthree\nfour\n"
    assert following(server, client, connections, whole) == whole


def test_only_breaks_without_progress_are_counted(
    server: JobServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_PATIENCE", 2)
    lines = [f"{number}\n" for number in range(6)]
    breaks = [["".join(lines[: number + 1]), "breaks"] for number in range(6)]
    assert following(server, client, [*breaks, ["ends"]], "".join(lines)) == "".join(lines)
    client.known.clear()
    with pytest.raises(RunError, match="does not answer as it should: connection reset by peer"):
        following(server, client, [["0\n", "breaks"], ["breaks"], ["breaks"], ["ends"]], "")


def test_a_reader_that_is_gone_is_no_fault_of_the_server(server: JobServer, client: Client) -> None:
    submit_or_follow(server, submission("exp"))
    client.connections = [["one\n", "ends"]]
    reader, writer = os.pipe()
    os.close(reader)

    def write(text: str) -> None:
        os.write(writer, text.encode())

    with pytest.raises(BrokenPipeError):
        server.follow("train-exp", write)
    os.close(writer)


def test_a_job_that_is_deleted_while_it_is_stopped_is_not_said_to_run_on(server: JobServer, client: Client) -> None:
    job, _ = submit_or_follow(server, submission("exp"))
    client.deletes = True
    with pytest.raises(RunError, match=r"job train-exp of http://.* is gone: it ended and was deleted"):
        stop_job(server, job, now=True, grace_s=1, announce=silent)


def test_a_job_of_somebody_elses_program_is_left_alone(server: JobServer, client: Client) -> None:
    client.known["train-exp"] = Details("train-exp", {}, "RUNNING")  # somebody's, without our metadata
    job, new = submit_or_follow(server, submission("exp"))
    assert (job.id, new) == ("train-exp-2", True)
