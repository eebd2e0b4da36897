"""What KubeRay makes of a RayJob of `k8s/`: containers of its pods, with command lines as in the operator's source."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = Mapping[str, Any]

_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


@dataclass(frozen=True)
class Container:
    """One container of a pod."""

    name: str
    pod: Spec
    """Spec of its pod."""
    spec: Spec
    environment: Mapping[str, str]
    command: Sequence[str]

    @property
    def memory(self) -> int:
        """Limit in bytes."""
        return in_bytes(self.spec["resources"]["limits"]["memory"])


@dataclass(frozen=True)
class Job:
    """A RayJob, as the operator runs it."""

    namespace: str
    entrypoint: str
    head: Container
    worker_start: Container
    """The init container of a worker, which waits for the head."""
    worker: Container
    workers: int
    submitter: Container


def in_bytes(quantity: str) -> int:
    """Bytes of a Kubernetes quantity such as 4Gi."""
    return next((int(quantity[:-2]) * size for unit, size in _UNITS.items() if quantity.endswith(unit)), 0) or int(
        quantity
    )


def ray_job(objects: Sequence[Spec], host: str, address: str, submission: str, token: str) -> Job:
    """Read a RayJob of its own cluster.

    Args:
        objects: of a folder of `k8s/`.
        host: name of the head's service.
        address: of the head.
        submission: id of the job.
        token: of the cluster.
    """
    job = next(one for one in objects if one["kind"] == "RayJob")
    settings = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
    cluster = job["spec"]["rayClusterSpec"]
    head, group = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    token_of = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    ray = {
        **token_of, "FQ_RAY_IP": host, "RAY_PORT": "6379", "RAY_CLUSTER_NAME": job["metadata"]["name"],
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
    }  # fmt: skip

    def container(pod: Spec, command: str, more: Mapping[str, str]) -> Container:
        spec = pod["containers"][0]
        values: dict[str, str] = {}
        for source in spec.get("envFrom", ()):
            values |= settings.get(source.get("configMapRef", {}).get("name"), {})
        return Container(spec["name"], pod, spec, {**values, **more}, ("/bin/bash", "-c", "--", command))

    head_pod, worker_pod = head["template"]["spec"], group["template"]["spec"]
    head_memory, worker_memory = (
        in_bytes(pod["containers"][0]["resources"]["limits"]["memory"]) for pod in (head_pod, worker_pod)
    )
    at_head = {**ray, "RAY_ADDRESS": "127.0.0.1:6379", "RAY_NODE_TYPE_NAME": "headgroup", "RAY_IP": "127.0.0.1"}
    at_worker = {**ray, "RAY_ADDRESS": f"{host}:6379", "RAY_NODE_TYPE_NAME": group["groupName"], "RAY_IP": host}
    dashboard = f"http://{host}:8265"
    return Job(
        job["metadata"]["namespace"],
        job["spec"]["entrypoint"],
        container(head_pod, _start(head["rayStartParams"], head_memory, head=True), at_head),
        container(
            worker_pod, f"until ray health-check --address {address}:6379 > /dev/null 2>&1; do sleep 2; done", at_worker
        ),
        container(worker_pod, _start(group["rayStartParams"], worker_memory, head=False, host=host), at_worker),
        int(group["replicas"]),
        container(
            {**cluster["headGroupSpec"]["template"]["spec"], **job["spec"]["submitterPodTemplate"]["spec"]},
            _submit(dashboard, submission, job["spec"]["entrypoint"]),
            {**token_of, "RAY_DASHBOARD_ADDRESS": f"{host}:8265", "RAY_JOB_SUBMISSION_ID": submission},
        ),
    )


def _start(params: Mapping[str, str], memory: int, head: bool, host: str = "") -> str:
    """`ray start` with sorted parameters, as KubeRay writes it."""
    flags = {"dashboard-agent-listen-port": "52365", "memory": str(memory), "metrics-export-port": "8080", **params}
    if head:
        flags["dashboard-host"] = "0.0.0.0"
    else:
        flags["address"] = f"{host}:6379"
    line = " ".join(f"--{name}={value}" for name, value in sorted(flags.items()))
    return f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start {'--head ' if head else ''}--block {line}"


def _submit(dashboard: str, submission: str, entrypoint: str) -> str:
    """What the submitter's pod runs."""
    at = f"--address {dashboard}"
    return (
        f"until python -c \"import os, urllib.request as u; u.urlopen(u.Request('{dashboard}/api/gcs_healthz', headers="
        "{'Authorization': 'Bearer ' + os.environ['RAY_AUTH_TOKEN']}), timeout=2)\" 2> /dev/null; do sleep 2; done; "
        f"if ! ray job status {at} {submission} > /dev/null 2>&1; then "
        f"ray job submit {at} --no-wait --submission-id {submission} -- {shlex.join(shlex.split(entrypoint))}; fi; "
        f"ray job logs {at} --follow {submission}"
    )
