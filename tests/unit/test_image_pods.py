"""The containers with which `make image` stands for KubeRay's pods follow from the manifests."""

from __future__ import annotations

from pathlib import Path

import pytest

from image.manifests import in_bytes, ray_job
from image.pods import Place, flags
from support.manifests import built

SERVICE = "head.example"


def test_command_lines_are_those_of_the_operator() -> None:
    job = ray_job(built("train"), SERVICE, "10.0.0.1", "train-1", "secret")
    *shell, head = job.head.command
    assert shell == ["/bin/bash", "-c", "--"]
    assert head == (
        "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}; ray start --head --block --dashboard-agent-listen-port=52365 "
        "--dashboard-host=0.0.0.0 --memory=4294967296 --metrics-export-port=8080 --num-cpus=0 "
        "--object-store-memory=500000000"
    )
    worker = job.worker.command[-1]
    assert worker.endswith(
        "ray start --block --address=head.example:6379 --dashboard-agent-listen-port=52365 --memory=4294967296 "
        "--metrics-export-port=8080 --num-cpus=1 --object-store-memory=500000000"
    )
    assert "--no-wait --submission-id train-1 -- spikefleet train digits --workers 2; fi" in job.submitter.command[-1]
    assert (job.namespace, job.workers) == ("spikefleet", 2)


def test_containers_are_as_restricted_as_the_manifests(tmp_path: Path) -> None:
    job = ray_job(built("train"), SERVICE, "10.0.0.1", "train-1", "secret")
    place = Place("pod", "none", tmp_path, Path("/claim"), {SERVICE: "10.0.0.1"})
    for container in (job.head, job.worker):
        found = " ".join(flags(container, place))
        for wanted in (
            "--user 1000:1000", "--read-only ", "--cap-drop=all", "--security-opt no-new-privileges",
            "--memory 4294967296 --cpus 2", "--volume /claim:/data", "--shm-size 1073741824", "/pod/tmp:/tmp",
            "--env RAY_AUTH_MODE=token", "--env SPIKEFLEET_RUNS=/data/runs",
        ):  # fmt: skip
            assert wanted in found, wanted


def test_quantities() -> None:
    assert [in_bytes(text) for text in ("1Gi", "100Mi", "500000000")] == [1 << 30, 100 << 20, 500_000_000]
    with pytest.raises(ValueError, match="1X"):
        in_bytes("1X")
